"""What both methods for long audio share: log-mel of windows, and their texts as segments."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.audio.log_mel import HOP, log_mel, log_powers, scale_log_powers
from flax_distil.decode.recognizer import Recognizer
from flax_distil.decode.search import Window
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.options import ChunkedOptions, DecodeOptions, SequentialOptions
from flax_distil.transcription.transcript import Transcript

EDGE = 2 * HOP  # samples on both sides of a piece that its first and last frames depend on
FRAME_RATE = SAMPLE_RATE // HOP  # 100 a second
FRAMES_PER_STEP = 2  # timestamp tokens are 0.02 s apart

Samples = Float32[np.ndarray, "_"]  # 16 kHz
LogMel = Float32[np.ndarray, "_ M"]
# Number of the recording, seconds read since the last one, its transcript once it is complete.
Progress = tuple[int, float, Transcript | None]


@dataclass(frozen=True, eq=False)
class LongFormJob:
    """How recordings are transcribed by one of the two methods.

    start: what all windows have in common (`prepare`); the language of a recording is detected from
    its first 30 s where it is None.
    """

    recognizer: Recognizer
    options: DecodeOptions
    start: Window
    batch_size: int = 8
    sequential: SequentialOptions = SequentialOptions()
    chunked: ChunkedOptions = ChunkedOptions()


def recording_mel(waveform: Samples, mels: int) -> LogMel:
    """Log-mel of all whole frames, T = n // 160, on the host, computed piece by piece.

    As in openai-whisper silence follows the recording, and its loudest frame sets the floor for
    all windows: equal to `log_mel` of the whole.
    """
    frames = waveform.size // HOP
    parts = []
    for start in range(0, max(frames, 1) * HOP, CLIP_SAMPLES):
        part = waveform[max(start - EDGE, 0) : start + CLIP_SAMPLES + EDGE]
        part = np.pad(part, (0, CLIP_SAMPLES + EDGE + min(start, EDGE) - part.size))
        if start == 0:
            part = np.pad(part, (EDGE, 0), mode="reflect")
        parts.append(np.asarray(_log_powers(part[None], mels)[0, EDGE // HOP : -EDGE // HOP]))
    log_TM = np.concatenate(parts)[:frames]
    return scale_log_powers(log_TM, np.asarray(log_TM.max())) if frames else log_TM


def clip_mel(waveform: Samples, mels: int) -> LogMel:
    """Log-mel of one clip on the host, as `recognize` computes it."""
    return np.asarray(_log_mel(waveform[None], mels)[0])


def pad_window(mel_TM: LogMel, start: int, size: int) -> LogMel:
    """3000 frames: `size` from `start` on, then openai-whisper's padding, zeros."""
    part = mel_TM[start : start + size]
    return np.pad(part, ((0, CHUNK_FRAMES - len(part)), (0, 0)))


_log_mel = jax.jit(log_mel, static_argnames="mels")
_log_powers = jax.jit(log_powers, static_argnames="mels")


def split_segments(
    ids: Sequence[int], times: range, size: int
) -> tuple[list[tuple[float, float, tuple[int, ...]]], int]:
    """The segments of a window of `size` frames, as (start, end, tokens), and frames to move on.

    Start and end are in timestamp steps of two frames. A segment ends between two consecutive
    timestamps. The text after the last pair is unfinished, and is decoded again with the next
    window, unless it ends with a single timestamp: then there is no speech after it.

    times: the ids of timestamps.
    """
    ids = tuple(ids)
    stamped = [token in times for token in ids]
    cuts = [at for at in range(1, len(ids)) if stamped[at - 1] and stamped[at]]
    closed = ends_alone(ids, times)
    if not cuts:
        last = max((at for at, is_time in enumerate(stamped) if is_time), default=None)
        end = size / FRAMES_PER_STEP
        if last is not None and ids[last] != times.start:
            end = ids[last] - times.start
        return [(0.0, float(end), ids)], size
    cuts += [len(ids)] * closed
    parts = [ids[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]
    step = lambda token: float(token - times.start)
    spans = [(step(part[0]), step(part[-1]), part) for part in parts]
    return spans, size if closed else FRAMES_PER_STEP * int(spans[-1][1])


def ends_alone(ids: Sequence[int], times: range) -> bool:
    """Whether the last token is a timestamp and the one before it is not."""
    return [token in times for token in ids[-2:]] == [False, True]
