"""The log-mel of a whole recording, computed piece by piece with one compiled program."""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.audio.log_mel import HOP, log_powers, scaled
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.model.spec import Params, Spec

EDGE = 2 * HOP  # samples on both sides of a piece that its first and last frames see


def recording_mel(waveform: Float32[np.ndarray, "n"], mels: int) -> Float32[np.ndarray, "T M"]:
    """Log-mel of all whole frames, T = n // 160, on the host.

    As in openai-whisper silence follows the recording, and its loudest frame sets the floor for
    all windows: equal to `log_mel` of the whole.
    """
    frames = waveform.size // HOP
    pieces = max(-(-frames // CHUNK_FRAMES), 1)
    padded = np.pad(waveform, (0, pieces * CLIP_SAMPLES + EDGE - waveform.size))
    padded = np.pad(padded, (EDGE, 0), mode="reflect")
    parts = [
        _piece(padded[start : start + CLIP_SAMPLES + 2 * EDGE], mels)
        for start in range(0, pieces * CLIP_SAMPLES, CLIP_SAMPLES)
    ]
    log_TM = np.concatenate(parts)[:frames]
    return scaled(log_TM, log_TM.max()) if frames else log_TM


def window(mel_TM: Float32[np.ndarray, "T M"], start: int, size: int) -> Float32[np.ndarray, "T M"]:
    """3000 frames: `size` from `start` on, then openai-whisper's padding, zeros."""
    part = mel_TM[start : start + size]
    return np.pad(part, ((0, CHUNK_FRAMES - len(part)), (0, 0)))


@partial(jax.jit, static_argnames="spec")
def listen_to_mel(
    spec: Spec, params: Params, mel_BTM: Float[Array, "B T M"]
) -> Float[Array, "B S D"]:
    """Log-mel windows to audio states. params: the encoder's."""
    return spec.encoder(params)(mel_BTM)


def _piece(waveform: Float32[np.ndarray, "n"], mels: int) -> np.ndarray:
    edge = EDGE // HOP
    return np.asarray(_log_powers(waveform[None], mels)[0, edge:-edge])


_log_powers = jax.jit(log_powers, static_argnames="mels")
