"""Decoding of audio and video files to 16 kHz mono float32, and encoding to FLAC."""

import io
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float32, Int16

from flax_distil.audio import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.audio.container import (
    AudioError,
    AudioSource,
    Limits,
    Track,
    declared_seconds,
    decoded_frames,
    open_audio,
    seek,
    source_name,
)
from flax_distil.audio.samples import (
    SampleBlock,
    mix_to_mono,
    place_frames,
    resample,
    split_seconds,
)
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

LOUDEST = 2.0  # of float samples: louder files were not written with 1 as full scale
PREROLL = 2  # seconds decoded before a part: the decoder's state, and up to a whole second
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
    for what, seconds in (("offset", offset), ("duration", duration)):
        if seconds is not None and not 0 <= seconds < math.inf:
            raise InputError(f"{what} is {seconds:g} s: it must be finite and at least 0")
    name, started = source_name(source), time.monotonic()
    start = round((offset or 0) * rate)
    end = None if duration is None else start + round(duration * rate)
    waveform, last = np.zeros(0, np.float32), 0
    # Float files may hold anything; NaN is found in the samples.
    with np.errstate(invalid="ignore", over="ignore"):
        file = None if isinstance(source, (str, Path, bytes)) else source
        back = file.tell() if file is not None and file.seekable() else None
        if start > PREROLL * rate and (file is None or back is not None):
            with open_audio(source, format, track, limits, started) as opened:
                seek(opened, start / rate - PREROLL)
                waveform, _ = decode_range(opened, rate, start, end, seeked=True)
            if not waveform.size and file is not None:
                file.seek(back or 0)
        if not waveform.size:
            with open_audio(source, format, track, limits, started) as opened:
                waveform, last = decode_range(opened, rate, start, end)
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
    with open_audio(source, format, track, LIMITS, time.monotonic()) as opened:
        declared = declared_seconds(opened)
        if declared is not None:
            return declared
        nothing = round(LIMITS.max_seconds * SAMPLE_RATE)
        return decode_range(opened, SAMPLE_RATE, nothing, None)[1] / SAMPLE_RATE


def decode_range(
    track: Track, rate: int, start: int, end: int | None, seeked: bool = False
) -> tuple[Float32[np.ndarray, "n"], int]:
    """The samples from `start` to before `end`, and the sample number at which decoding ended.

    rate, start, end: of the samples in Hz, and of the part in samples; None for the end of the
        recording.
    seeked: the file is read from its current position before the part, not from its beginning. The
        result is empty if that position is inside or after the part.
    """
    name, limits = track.name, track.limits
    frames = place_frames(decoded_frames(track), track, seeked)
    samples = bytearray()  # one growing buffer: hours of audio need little more than their own size
    cancelled, loudest, last = 0.0, 0.0, 0

    def one_channel() -> Iterator[SampleBlock]:
        nonlocal cancelled
        for chunk in split_seconds(frames, seeked):
            mono, cancels = mix_to_mono(chunk)
            cancelled += cancels * chunk.samples.shape[1] / chunk.rate
            yield mono

    for chunk in resample(one_channel(), rate):
        track.check_time()
        last = chunk.end
        if seeked and not samples and chunk.index > start:
            break
        block = chunk.within(start, end).samples
        if block.size:
            if not np.isfinite(block).all():
                raise AudioError(f"{name}: the samples hold NaN or infinity; write the file again")
            loudest = max(loudest, float(np.abs(block).max()))
            samples += block.tobytes()
        if len(samples) > 4 * limits.max_seconds * rate:
            raise AudioError(
                f"{name}: longer than {limits.max_seconds:g} s: split it, or raise max_seconds"
            )
        if end is not None and last >= end:
            break
    waveform = np.frombuffer(samples, np.float32)
    if cancelled:
        logger.warning(
            "%s: the channels cancel each other in %.0f s: the louder one is used there",
            name,
            cancelled,
        )
    if loudest > LOUDEST:
        logger.warning("%s: samples reach %g, not 1: divided by that", name, loudest)
        waveform = waveform / np.float32(loudest)
    return waveform, last


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
