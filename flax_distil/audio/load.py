"""Any audio file, or the sound of any video, to 16 kHz mono float32; and back to FLAC bytes."""

import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Float32, Int16

from flax_distil.audio import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.audio.container import (
    AudioError,
    AudioSource,
    Deadline,
    Opened,
    audio_errors,
    declared_seconds,
    decoded_frames,
    open_audio,
    seek,
    source_name,
)
from flax_distil.audio.samples import (
    Chunk,
    TrackClock,
    mix_to_mono,
    place_frames,
    resample,
    split_seconds,
)
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

LOUDEST = 2.0  # of float samples: what lies beyond was not written with 1 as full scale
PREROLL = 2  # seconds decoded before a part: a decoder's memory, and up to a whole second


@dataclass(frozen=True)
class Limits:
    """How much of a file is decoded."""

    max_seconds: float = 12 * 3600.0
    """Longest recording; a second takes 64 kB of memory."""
    deadline: float = 600.0
    """Seconds of time after which decoding is given up."""


LIMITS = Limits()


def load_audio(
    source: AudioSource,
    rate: int = SAMPLE_RATE,
    format: str | None = None,
    offset: float | None = None,
    duration: float | None = None,
    *,
    track: int | None = None,
    limits: Limits = LIMITS,
) -> Float32[np.ndarray, "n"]:
    """Decode, average the channels and resample: float32 in [-1, 1] at `rate` Hz.

    source: a path, the bytes of a file, or an open binary file.
    format: the container where neither header nor file name tells it: raw G.722 bytes need
        `format="g722"`.
    offset, duration: seconds of the part that is decoded, without the rest where the format can be
        searched. These are the samples of a slice of the whole; of lossy codecs to within their
        own error, and in containers with a coarse clock (1 ms in Matroska) to within its step.
    track: number of the audio track, from 1; without it the file's default track.
    limits: a longer recording, or one that takes longer to decode, is an error.

    Gaps in the time stamps and a late start are silence, so that times are the file's. Where the
    channels cancel each other (opposite phase) the louder one is taken, and float samples beyond ±2
    are divided by the loudest; a warning says so. A damaged or cut file yields what decodes
    cleanly, with a warning.

    Raises AudioError when the file is missing, not of sound, too long, decodes to nothing or holds
    NaN.
    """
    name, deadline = source_name(source), Deadline.after(limits.deadline)
    start = 0 if offset is None else to_samples(offset, "offset", rate)
    end = None if duration is None else start + to_samples(duration, "duration", rate)
    part = SampleRange(rate, start, end)
    waveform, last = np.zeros(0, np.float32), 0
    # Float files may hold anything; what is no number is found in the samples.
    with audio_errors(name), np.errstate(invalid="ignore", over="ignore"):
        back = position(source)
        if start > PREROLL * rate and back is not None:
            with open_audio(source, format, track, deadline) as opened:
                seek(opened, start / rate - PREROLL)
                waveform, _ = decode_range(opened, part, name, limits, deadline, sought=True)
            if not waveform.size and not isinstance(source, (str, Path, bytes)):
                source.seek(back)
        if not waveform.size:
            with open_audio(source, format, track, deadline) as opened:
                waveform, last = decode_range(opened, part, name, limits, deadline)
    if start and last and not waveform.size:
        raise AudioError(
            f"{name}: the part starts at {offset:g} s, and the audio ends at {last / rate:g} s"
        )
    if not waveform.size:
        raise AudioError(f"{name}: no audio could be decoded; is the file empty or damaged?")
    return waveform


def audio_duration(
    source: AudioSource, format: str | None = None, *, track: int | None = None
) -> float:
    """Length in seconds, from the header where it tells, by decoding where it does not.

    The header's word is not checked: a cut file may claim more than it holds.
    Raises AudioError like `load_audio`.
    """
    name, deadline = source_name(source), Deadline.after(LIMITS.deadline)
    with audio_errors(name), open_audio(source, format, track, deadline) as opened:
        declared = declared_seconds(opened)
        if declared is not None:
            return declared
        nothing = SampleRange(SAMPLE_RATE, round(LIMITS.max_seconds * SAMPLE_RATE), None)
        return decode_range(opened, nothing, name, LIMITS, deadline)[1] / SAMPLE_RATE


class SampleRange(NamedTuple):
    """The samples from `start` to before `end` at `rate` Hz; None is the end of the recording."""

    rate: int
    start: int
    end: int | None


def decode_range(
    opened: Opened,
    part: SampleRange,
    name: str,
    limits: Limits,
    deadline: Deadline,
    sought: bool = False,
) -> tuple[Float32[np.ndarray, "n"], int]:
    """A part of an opened file, and the number of the sample at which decoding ended.

    The file is read from its beginning or, if `sought`, from where it stands: somewhere before the
    part. Nothing is returned where that turns out to lie inside or behind it.
    """
    frames = decoded_frames(opened, name, deadline)
    track = place_frames(frames, TrackClock.of(opened), name, limits.max_seconds, sought)
    samples = bytearray()  # one growing buffer: hours of audio cost their own size and little more
    cancelled, loudest, last = 0.0, 0.0, 0

    def one_channel() -> Iterator[Chunk]:
        nonlocal cancelled
        for piece in split_seconds(track, sought):
            mono, cancels = mix_to_mono(piece)
            cancelled += cancels * piece.samples.shape[1] / piece.rate
            yield mono

    for piece in resample(one_channel(), part.rate):
        deadline.check(name)
        last = piece.end
        if sought and not samples and piece.index > part.start:
            break
        block = piece.within(part.start, part.end).samples
        if block.size:
            if not np.isfinite(block).all():
                raise AudioError(f"{name}: the samples hold NaN or infinity; write the file again")
            loudest = max(loudest, float(np.abs(block).max()))
            samples += block.tobytes()
        if len(samples) > 4 * limits.max_seconds * part.rate:
            raise AudioError(
                f"{name}: longer than {limits.max_seconds:g} s: split it, or raise max_seconds"
            )
        if part.end is not None and last >= part.end:
            break
    waveform = np.frombuffer(samples, np.float32)
    if cancelled:
        logger.warning(
            "%s: the channels cancel each other in %.0f s: the louder one is taken there",
            name,
            cancelled,
        )
    return full_scale(waveform, loudest, name), last


def full_scale(
    waveform: Float32[np.ndarray, "n"], loudest: float, name: str
) -> Float32[np.ndarray, "n"]:
    """The samples, in place divided by the loudest one where that lies far beyond 1; a warning says
    so."""
    if loudest > LOUDEST:
        logger.warning("%s: samples reach %g, not 1: divided by that", name, loudest)
        waveform /= np.float32(loudest)
    return waveform


def to_samples(seconds: float, what: str, rate: int) -> int:
    """A time as a number of samples. Raises InputError for one that is none."""
    if not 0 <= seconds < math.inf:
        raise InputError(f"{what} is {seconds:g} s: it must be a number from 0 on")
    return round(seconds * rate)


def position(source: AudioSource) -> int | None:
    """Where a file object stands, so that it can be read again; None where it cannot."""
    if isinstance(source, (str, Path, bytes)):
        return 0
    return source.tell() if getattr(source, "seekable", bool)() else None


def pad_or_trim(waveform: np.ndarray, length: int = CLIP_SAMPLES) -> np.ndarray:
    """Cut the last axis to `length` samples, or fill it up with silence; keeps the dtype."""
    waveform = waveform[..., :length]
    missing = length - waveform.shape[-1]
    return np.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, missing)])


def to_int16(waveform: np.ndarray) -> Int16[np.ndarray, "..."]:
    """16-bit samples of a float waveform in [-1, 1]; louder samples are clipped.

    The inverse of dividing by 32768, which `log_mel` does: 16-bit recordings survive unchanged.
    """
    return np.clip(np.round(waveform * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(waveform: Float32[np.ndarray, "n"], rate: int = SAMPLE_RATE) -> bytes:
    """The bytes of a 16-bit mono FLAC file of a waveform in [-1, 1]."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        # The longest frames that every player takes: four times fewer than FFmpeg's choice.
        options = {"frame_size": "4608"}
        stream = container.add_stream("flac", rate=rate, layout="mono", options=options)
        frame = av.AudioFrame.from_ndarray(to_int16(waveform)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
