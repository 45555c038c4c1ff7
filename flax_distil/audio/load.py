"""Decoding of audio and video files to 16 kHz mono float32, and encoding to FLAC."""

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
    SampleBlock,
    TrackClock,
    mix_to_mono,
    place_frames,
    resample,
    split_seconds,
)
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

LOUDEST = 2.0  # of float samples: louder files were not written with 1 as full scale
PREROLL = 2  # seconds decoded before a part: the decoder's state, and up to a whole second


@dataclass(frozen=True)
class Limits:
    """Limits of decoding one file."""

    max_seconds: float = 12 * 3600.0
    """Longest recording; a second takes 64 kB of memory."""
    deadline: float = 600.0
    """Seconds after which decoding is given up."""


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
    """Decode a file, average its channels and resample: float32 in [-1, 1] at `rate` Hz.

    source: a path, the bytes of a file, or an open binary file.
    format: the container of files without a header, such as `format="g722"` for raw G.722.
    offset, duration: seconds of the part to decode. Its samples equal a slice of the whole; with
        lossy codecs to within their error, and in containers with a coarse clock (1 ms in Matroska)
        to within its step.
    track: number of the audio track, from 1; without it the file's default track.
    limits: of length and decoding time.

    Gaps in the time stamps and a late start become silence, so that times are the file's. With a
    warning, the louder channel is used where the channels cancel each other (opposite phase), float
    samples beyond ±2 are divided by the loudest, and a damaged file gives what can be decoded.

    Raises:
        AudioError: the file is missing, not audio, too long or empty, or holds NaN.
    """
    name, deadline = source_name(source), Deadline.after(limits.deadline)
    start = 0 if offset is None else to_samples(offset, "offset", rate)
    end = None if duration is None else start + to_samples(duration, "duration", rate)
    part = SampleRange(rate, start, end)
    waveform, last = np.zeros(0, np.float32), 0
    # Float files may hold anything; NaN is found in the samples.
    with audio_errors(name), np.errstate(invalid="ignore", over="ignore"):
        back = position(source)
        if start > PREROLL * rate and back is not None:
            with open_audio(source, format, track, deadline) as opened:
                seek(opened, start / rate - PREROLL)
                waveform, _ = decode_range(opened, part, name, limits, deadline, seeked=True)
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
    """Length in seconds, from the header or, without one, by decoding.

    The header is not verified: a truncated file may be shorter. Raises AudioError as `load_audio`.
    """
    name, deadline = source_name(source), Deadline.after(LIMITS.deadline)
    with audio_errors(name), open_audio(source, format, track, deadline) as opened:
        declared = declared_seconds(opened)
        if declared is not None:
            return declared
        nothing = SampleRange(SAMPLE_RATE, round(LIMITS.max_seconds * SAMPLE_RATE), None)
        return decode_range(opened, nothing, name, LIMITS, deadline)[1] / SAMPLE_RATE


class SampleRange(NamedTuple):
    """The samples from `start` to before `end` at `rate` Hz; None for the end of the recording."""

    rate: int
    start: int
    end: int | None


def decode_range(
    opened: Opened,
    part: SampleRange,
    name: str,
    limits: Limits,
    deadline: Deadline,
    seeked: bool = False,
) -> tuple[Float32[np.ndarray, "n"], int]:
    """A part of an opened file, and the sample number at which decoding ended.

    seeked: the file is read from its current position before the part, not from its beginning. The
        result is empty if that position is inside or after the part.
    """
    frames = decoded_frames(opened, name, deadline)
    track = place_frames(frames, TrackClock.of(opened), name, limits.max_seconds, seeked)
    samples = bytearray()  # one growing buffer: hours of audio need little more than their own size
    cancelled, loudest, last = 0.0, 0.0, 0

    def one_channel() -> Iterator[SampleBlock]:
        nonlocal cancelled
        for chunk in split_seconds(track, seeked):
            mono, cancels = mix_to_mono(chunk)
            cancelled += cancels * chunk.samples.shape[1] / chunk.rate
            yield mono

    for chunk in resample(one_channel(), part.rate):
        deadline.check(name)
        last = chunk.end
        if seeked and not samples and chunk.index > part.start:
            break
        block = chunk.within(part.start, part.end).samples
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
            "%s: the channels cancel each other in %.0f s: the louder one is used there",
            name,
            cancelled,
        )
    return full_scale(waveform, loudest, name), last


def full_scale(
    waveform: Float32[np.ndarray, "n"], loudest: float, name: str
) -> Float32[np.ndarray, "n"]:
    """The samples, divided by the loudest one with a warning where that is far beyond 1."""
    if loudest > LOUDEST:
        logger.warning("%s: samples reach %g, not 1: divided by that", name, loudest)
        return waveform / np.float32(loudest)
    return waveform


def to_samples(seconds: float, what: str, rate: int) -> int:
    """A time as a number of samples. Raises InputError for a negative or infinite one."""
    if not 0 <= seconds < math.inf:
        raise InputError(f"{what} is {seconds:g} s: it must be finite and at least 0")
    return round(seconds * rate)


def position(source: AudioSource) -> int | None:
    """The position of a file object, to read it again; None where it cannot be."""
    if isinstance(source, (str, Path, bytes)):
        return 0
    return source.tell() if getattr(source, "seekable", bool)() else None


def pad_or_trim(waveform: np.ndarray, length: int = CLIP_SAMPLES) -> np.ndarray:
    """The last axis cut or padded with silence to `length` samples; keeps the dtype."""
    waveform = waveform[..., :length]
    missing = length - waveform.shape[-1]
    return np.pad(waveform, [(0, 0)] * (waveform.ndim - 1) + [(0, missing)])


def to_int16(waveform: np.ndarray) -> Int16[np.ndarray, "..."]:
    """16-bit samples of a float waveform in [-1, 1]; louder samples are clipped.

    This inverts the division by 32768 in `log_mel`, so that 16-bit recordings stay unchanged.
    """
    return np.clip(np.round(waveform * 32768.0), -32768, 32767).astype(np.int16)


def encode_flac(waveform: Float32[np.ndarray, "n"], rate: int = SAMPLE_RATE) -> bytes:
    """The bytes of a 16-bit mono FLAC file of a waveform in [-1, 1]."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        # The longest frames that every player accepts: a quarter as many as by default.
        options = {"frame_size": "4608"}
        stream = container.add_stream("flac", rate=rate, layout="mono", options=options)
        frame = av.AudioFrame.from_ndarray(to_int16(waveform)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
