"""Waveform to Whisper's log-mel spectrogram, inside jit, on whatever device the model runs.

The Fourier transform of 400 samples is an FFT on CPUs and a product with fixed matrices elsewhere:
a TPU's matrix unit has no use for a 400-point FFT, and XLA gathers an FFT whose batch is sharded;
on a CPU the FFT is up to twice as fast (docs/LOG.md, 2026-11-23).
"""

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import Precision, platform_dependent
from jaxtyping import Float, Float32, Float64, Int16

from flax_distil.audio import SAMPLE_RATE

WINDOW = 400  # samples a frame sees, 25 ms
HOP = 160  # samples between frames, 10 ms
HALF = WINDOW // 2


def log_mel(
    waveform_BN: Float[Array | np.ndarray, "B N"] | Int16[Array | np.ndarray, "B N"], mels: int
) -> Float32[Array, "B T M"]:
    """Log-mel spectrogram of 16 kHz audio, time before bins: T = N // 160 frames, M = `mels` bins.

    Floats are in [-1, 1]; int16 samples are divided by 32768. Pad or trim to 30 s beforehand, as
    Whisper was trained: the floor of each clip lies 8 decades below its own loudest bin.
    Equal to Transformers' WhisperFeatureExtractor (transposed) within 1e-4.
    """
    log_BTM = log_powers(waveform_BN, mels)
    return scale_log_powers(log_BTM, log_BTM.max(axis=(1, 2), keepdims=True))


def scale_log_powers(
    log_BTM: Float[Array | np.ndarray, "*B T M"], loudest: Float[Array | np.ndarray, "..."]
) -> Any:
    """Log powers clipped 8 decades below the loudest one of a clip and scaled for the model.

    NumPy in, NumPy out, as with JAX.
    """
    return (log_BTM.clip(loudest - 8) + 4) / 4


def log_powers(
    waveform_BN: Float[Array | np.ndarray, "B N"] | Int16[Array | np.ndarray, "B N"], mels: int
) -> Float32[Array, "B T M"]:
    """Decimal logarithms of the mel powers, at least -10."""
    waveform_BN = jnp.asarray(waveform_BN)
    if waveform_BN.dtype == jnp.int16:
        waveform_BN = waveform_BN.astype(jnp.float32) / 32768
    frames_BTW = frame(waveform_BN.astype(jnp.float32)) * hann().astype(np.float32)[None, None]
    filters = mel_filters(mels).astype(np.float32)
    mel_BTM = platform_dependent(
        frames_BTW,
        cpu=lambda frames: mel_by_fft(frames, filters),
        default=lambda frames: mel_by_matrices(frames, filters),
    )
    return jnp.log10(jnp.maximum(mel_BTM, 1e-10))


def frame(waveform_BN: Float32[Array, "B N"]) -> Float32[Array, "B T 400"]:
    """Frames of 400 samples centred on every 160th, edges reflected, the last frame dropped.

    A frame is two hops and a half, so slices of the hop-sized blocks give it without a gather.
    """
    frames = waveform_BN.shape[1] // HOP
    padded = jnp.pad(waveform_BN, ((0, 0), (HALF, HALF)), mode="reflect")
    blocks = jnp.pad(padded, ((0, 0), (0, -padded.shape[1] % HOP)))
    blocks = blocks.reshape(len(waveform_BN), -1, HOP)
    return jnp.concatenate(
        [blocks[:, :frames], blocks[:, 1 : frames + 1], blocks[:, 2 : frames + 2, : WINDOW % HOP]],
        axis=-1,
    )


def mel_by_fft(frames_BTW: Array, filters: np.ndarray) -> Float32[Array, "B T M"]:
    """Mel powers of windowed frames; F = 201 frequency bins in between."""
    spectrum_BTF = jnp.fft.rfft(frames_BTW)
    return exact_matmul(spectrum_BTF.real**2 + spectrum_BTF.imag**2, filters)


def mel_by_matrices(frames_BTW: Array, filters: np.ndarray) -> Float32[Array, "B T M"]:
    """The same as matrix products; one radix-2 step halves the matrices.

    e^(-2πik(n+200)/400) = (-1)^k e^(-2πikn/400): even bins see the sum of the two half frames,
    odd bins their difference.
    """
    first, second = jnp.split(frames_BTW, 2, axis=-1)
    even, odd = (matrix.astype(np.float32) for matrix in half_fourier())
    even_power, odd_power = (
        cosine**2 + sine**2
        for cosine, sine in (
            jnp.split(exact_matmul(first + second, even), 2, axis=-1),
            jnp.split(exact_matmul(first - second, odd), 2, axis=-1),
        )
    )
    return exact_matmul(even_power, filters[0::2]) + exact_matmul(odd_power, filters[1::2])


def exact_matmul(left: Array, right: np.ndarray) -> Array:
    """A float32 product on every device: by default TPUs round to bfloat16, GPUs to TF32."""
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


def hann() -> Float64[np.ndarray, "400"]:
    """Hann window, periodic: as if one sample longer."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)


@cache
def half_fourier() -> tuple[Float64[np.ndarray, "200 202"], Float64[np.ndarray, "200 200"]]:
    """Cosines and sines over half a frame for the even bins 0 … 200 and the odd bins 1 … 199."""
    phase = 2 * np.pi / WINDOW * np.outer(np.arange(HALF), np.arange(HALF + 1))
    even, odd = phase[:, 0::2], phase[:, 1::2]
    return (
        np.concatenate([np.cos(even), np.sin(even)], axis=1),
        np.concatenate([np.cos(odd), np.sin(odd)], axis=1),
    )


@cache
def mel_filters(mels: int) -> Float64[np.ndarray, "201 {mels}"]:
    """Slaney's triangular filters of unit area, evenly spaced in mel from 0 to 8 kHz.

    The mel scale is linear (200/3 Hz a mel) up to 1 kHz and logarithmic (27 steps from 1 to
    6.4 kHz) above it.
    """
    knee_hz, knee, step = 1000.0, 15.0, np.log(6.4) / 27
    top = knee + np.log(SAMPLE_RATE / 2 / knee_hz) / step
    points = np.linspace(0.0, top, mels + 2)
    hertz = np.where(
        points < knee,
        points * knee_hz / knee,
        knee_hz * np.exp(step * (np.maximum(points, knee) - knee)),
    )
    bins = np.linspace(0.0, SAMPLE_RATE / 2, HALF + 1)[:, None]
    left, centre, right = hertz[:-2], hertz[1:-1], hertz[2:]
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (right - left)
