"""Additive noise at a signal-to-noise ratio, for the paper's robustness test (section 5.3).

On the host, in NumPy: clips differ in length, and every length would compile another program. A
`seed` is that of `numpy.random.default_rng`; `(run_seed, clip_number)` gives each clip its own
noise, the same in every run.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from flax_distil.errors import InputError


def white_noise(seed: int | Sequence[int], length: int) -> Float32[np.ndarray, "n"]:
    """Gaussian white noise of unit power."""
    return np.random.default_rng(seed).standard_normal(length, np.float32)


def noise_excerpt(
    seed: int | Sequence[int] | np.random.Generator,
    recording: Float32[np.ndarray, "m"],
    length: int,
) -> Float32[np.ndarray, "n"]:
    """`length` samples of a noise recording from a random start, looped if it is too short.

    Raises InputError where the recording is empty.
    """
    if not recording.size:
        raise InputError("the noise recording has 0 samples: give one with audio")
    start = np.random.default_rng(seed).integers(recording.size)
    return np.take(recording, np.arange(start, start + length), mode="wrap")


def mix_at_snr(
    waveform: Float32[np.ndarray, "n"], noise: Float32[np.ndarray, "m"], snr_db: float
) -> Float32[np.ndarray, "n"]:
    """`waveform + gain · noise`, with the noise `snr_db` decibels below the clip's mean power.

    Mix before padding, which would lower the clip's power. A silent clip stays silent. The sum may
    exceed [-1, 1], which `log_mel` accepts.

    Raises:
        InputError: the lengths differ, or the noise is silent and the waveform is not.
    """
    if waveform.shape != noise.shape:
        raise InputError(
            f"the waveform has {waveform.size} samples and the noise {noise.size}: cut or loop the "
            "noise with noise_excerpt"
        )
    signal_power, noise_power = mean_power(waveform), mean_power(noise)
    if signal_power == 0:
        return waveform
    if noise_power == 0:
        raise InputError("the noise is silent: no gain gives the signal-to-noise ratio")
    gain = np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10))
    return (waveform + gain * noise).astype(np.float32)


def mean_power(waveform: np.ndarray) -> float:
    """Mean square of the samples; 0 for an empty waveform."""
    return float(np.square(waveform, dtype=np.float64).mean()) if waveform.size else 0.0
