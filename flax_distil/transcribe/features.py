"""The log-mel of a whole recording, computed piece by piece with one compiled program."""

import jax
import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.audio.log_mel import HOP, log_mel, log_powers, scale_log_powers
from flax_distil.model.dims import CHUNK_FRAMES

EDGE = 2 * HOP  # samples on both sides of a piece that its first and last frames depend on


def recording_mel(waveform: Float32[np.ndarray, "n"], mels: int) -> Float32[np.ndarray, "T M"]:
    """Log-mel of all whole frames, T = n // 160, on the host.

    As in openai-whisper silence follows the recording, and its loudest frame sets the floor for
    all windows: equal to `log_mel` of the whole.
    """
    frames = waveform.size // HOP
    starts = range(0, max(frames, 1) * HOP, CLIP_SAMPLES)
    parts = [_piece(waveform, start, mels) for start in starts]
    log_TM = np.concatenate(parts)[:frames]
    return scale_log_powers(log_TM, np.asarray(log_TM.max())) if frames else log_TM


def clip_mel(waveform: Float32[np.ndarray, "n"], mels: int) -> Float32[np.ndarray, "T M"]:
    """Log-mel of one clip on the host, as `recognize` computes it."""
    return np.asarray(_log_mel(waveform[None], mels)[0])


def pad_window(
    mel_TM: Float32[np.ndarray, "T M"], start: int, size: int
) -> Float32[np.ndarray, "W M"]:
    """3000 frames: `size` from `start` on, then openai-whisper's padding, zeros."""
    part = mel_TM[start : start + size]
    return np.pad(part, ((0, CHUNK_FRAMES - len(part)), (0, 0)))


def _piece(waveform: Float32[np.ndarray, "n"], start: int, mels: int) -> np.ndarray:
    """Log powers of the 30 s from `start` on; the waveform is mirrored before its start."""
    part = waveform[max(start - EDGE, 0) : start + CLIP_SAMPLES + EDGE]
    part = np.pad(part, (0, CLIP_SAMPLES + EDGE + min(start, EDGE) - part.size))
    if start == 0:
        part = np.pad(part, (EDGE, 0), mode="reflect")
    edge = EDGE // HOP
    return np.asarray(_log_powers(part[None], mels)[0, edge:-edge])


_log_mel = jax.jit(log_mel, static_argnames="mels")
_log_powers = jax.jit(log_powers, static_argnames="mels")
