"""Safe opening of media files: a list of allowed formats, no references to other files."""

import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)


@runtime_checkable
class BinaryFile(Protocol):
    """An open file that is read as bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go to a position."""
        ...

    def tell(self) -> int:
        """The position."""
        ...


AudioSource = str | Path | bytes | BinaryFile
Opened = tuple[InputContainer, AudioStream]

# FFmpeg's demuxers that read audio from the file itself. Excluded are playlists and lists of files
# (hls, concat, dash, sdp, image sequences, ...), which open any file that they name, devices, and
# formats of pictures, subtitles and games.
FORMATS = (
    *("aa", "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "asf", "au", "avi", "caf", "dsf"),
    *("dts", "dtshd", "eac3", "flac", "flv", "g722", "g723_1", "g726", "g726le", "g729", "gsm"),
    *("iff", "ilbc", "ircam", "loas", "matroska", "mlp", "mov", "mp3", "mpc", "mpc8", "mpeg"),
    *("mpegts", "mxf", "nistsphere", "nut", "ogg", "oma", "paf", "pvf", "qcp", "rm", "sbc", "sds"),
    *("shn", "sln", "sox", "tak", "truehd", "tta", "voc", "vqf", "w64", "wav", "wsd", "wv", "xwma"),
    *("alaw", "mulaw", "s8", "u8", "s16be", "s16le", "s24be", "s24le", "s32be", "s32le"),
    *("f32be", "f32le", "f64be", "f64le"),
)
OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "enable_drefs": "0",  # of QuickTime: audio in another file
    "use_absolute_path": "0",
}
RATES = range(1_000, 1_000_001)  # Hz; a header with another rate is damaged
RESTARTS = 0x0200  # AVFMT_TS_DISCONT: time stamps of the format may start anywhere and jump


class AudioError(InputError):
    """Audio that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Deadline:
    """The time at which decoding of a file is given up."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """A deadline `seconds` from now."""
        return cls(seconds, time.monotonic() + seconds)

    def check(self, name: str) -> None:
        """Raises AudioError if it has passed."""
        if time.monotonic() > self.end:
            raise AudioError(
                f"{name}: not decoded after {self.seconds:g} s: write the file again, or raise the "
                "deadline"
            )


def source_name(source: AudioSource) -> str:
    """The source's name in error messages."""
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio stream"))


def reason(error: BaseException) -> str:
    """FFmpeg's message, without error number and file name."""
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextmanager
def audio_errors(name: str) -> Iterator[None]:
    """Turns the exceptions of FFmpeg and PyAV for damaged files into AudioError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise AudioError(f"{name}: damaged, or not audio ({reason(error)})") from error


@contextmanager
def open_audio(
    source: AudioSource, format: str | None, track: int | None, deadline: Deadline
) -> Iterator[Opened]:
    """An open container and its audio track number `track`, from 1; None is the default track.

    Raises:
        AudioError: the file is missing, of another format, or without that track.
    """
    name, protocols = source_name(source), "none"
    if format is not None and format.split(":")[0] not in FORMATS:
        raise AudioError(f"{name}: {format} is not an audio format: use one of {' '.join(FORMATS)}")
    if isinstance(source, (str, Path)):
        check_regular(name, Path(source))
        # Without the scheme, "10:30.wav" would be parsed as the protocol "10".
        source, protocols = f"file:{source}", "file"
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    options = OPTIONS | {"protocol_whitelist": protocols}
    try:
        container = av.open(source, "r", format, options=options, timeout=deadline.seconds)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        deadline.check(name)
        if isinstance(
            error, av.error.ArgumentError
        ):  # FFmpeg's error for a format off the whitelist
            raise AudioError(
                f"{name}: not an audio file; playlists and lists of files are not followed"
            ) from error
        raise AudioError(
            f"{name}: not an audio file that FFmpeg can read ({reason(error)})"
        ) from error
    with container:
        yield container, choose_track(container, track, name)


def check_regular(name: str, path: Path) -> None:
    """Raises AudioError for a missing file, and for a pipe, device or folder."""
    try:
        if path.is_file():
            return
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read ({reason(error)})") from None
    kind = "not a regular file: copy its audio into one" if exists else "no such audio file"
    raise AudioError(f"{name}: {kind}")


def choose_track(container: InputContainer, track: int | None, name: str) -> AudioStream:
    """The audio track of that number, or the default one."""
    tracks = container.streams.audio
    if not tracks:
        raise AudioError(f"{name}: the file has no audio stream")
    if track is None:
        marked = (one for one in tracks if one.disposition & Disposition.default)
        return next(marked, tracks[0])
    if not 1 <= track <= len(tracks):
        known = ", ".join(
            f"{number} ({describe_track(one)})" for number, one in enumerate(tracks, 1)
        )
        raise AudioError(f"{name}: no audio track {track}; the file has {known}")
    return tracks[track - 1]


def describe_track(track: AudioStream) -> str:
    """Language, title and codec of a track."""
    known = [track.metadata.get("language"), track.metadata.get("title")]
    codec = track.codec_context.name if track.codec_context else "unknown codec"
    default = "default" if track.disposition & Disposition.default else None
    return ", ".join(filter(None, [*known, codec, default]))


def declared_seconds(opened: Opened) -> float | None:
    """Length in the header; None where it is missing or invalid."""
    container, stream = opened
    found = None
    if stream.duration is not None and stream.time_base is not None:
        found = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        found = container.duration / av.time_base
    return found if found is not None and 0 <= found < math.inf else None


def decoded_frames(opened: Opened, name: str, deadline: Deadline) -> Iterator[AudioFrame]:
    """Frames of the track; packets that cannot be decoded are skipped with a warning."""
    container, stream = opened
    packets = container.demux(stream)
    damaged = 0
    while True:
        deadline.check(name)
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError as error:
            deadline.check(name)
            logger.warning("%s: reading stopped early: %s", name, reason(error))
            break
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            if frame.rate not in RATES:
                raise AudioError(
                    f"{name}: the header has {frame.rate} Hz, and audio {RATES[0]} to "
                    f"{RATES[-1]}: write the file again"
                )
            yield frame  # type: ignore[misc]
    if damaged:
        logger.warning("%s: %d damaged packets were left out", name, damaged)


def seek(opened: Opened, seconds: float) -> None:
    """Seek to the last packet at or before `seconds`, where the format can be searched."""
    container, stream = opened
    assert stream.time_base is not None
    target = int(seconds / stream.time_base) + (stream.start_time or 0)
    with suppress(av.error.FFmpegError):  # then it is read from the current position
        container.seek(target, stream=stream)
