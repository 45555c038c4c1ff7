"""Safe opening of media files: a list of allowed formats, no references to other files."""

import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

AudioSource = str | Path | bytes | io.IOBase

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
class Limits:
    """Limits of decoding one file."""

    max_seconds: float = 12 * 3600.0
    """Longest recording; a second takes 64 kB of memory."""
    deadline: float = 600.0
    """Seconds after which decoding is given up."""

    def check_time(self, name: str, started: float) -> None:
        """Raises AudioError if the deadline has passed. started: on the monotonic clock."""
        if time.monotonic() > started + self.deadline:
            raise AudioError(
                f"{name}: not decoded after {self.deadline:g} s: write the file again, or raise "
                "the deadline"
            )


@dataclass(frozen=True)
class Track:
    """An audio track of an open file."""

    container: InputContainer
    stream: AudioStream
    name: str
    """The source's name in messages."""
    limits: Limits
    started: float
    """Time on the monotonic clock at which reading began."""

    def check_time(self) -> None:
        """Raises AudioError if the deadline has passed."""
        self.limits.check_time(self.name, self.started)


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
def open_audio(
    source: AudioSource, format: str | None, track: int | None, limits: Limits, started: float
) -> Iterator[Track]:
    """The audio track number `track` of a file, from 1; None is the default track.

    Exceptions of FFmpeg and PyAV for damaged files, also later ones, become AudioError.

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
        container = av.open(source, "r", format, options=options, timeout=limits.deadline)
    except av.error.ArgumentError as error:  # FFmpeg's error for a format off the whitelist
        raise AudioError(
            f"{name}: not an audio file; playlists and lists of files are not followed"
        ) from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        limits.check_time(name, started)
        raise AudioError(
            f"{name}: not an audio file that FFmpeg can read ({reason(error)})"
        ) from error
    try:
        with container:
            yield Track(container, choose_track(container, track, name), name, limits, started)
    except InputError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise AudioError(f"{name}: damaged, or not audio ({reason(error)})") from error


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
    defaults = [one for one in tracks if one.disposition & Disposition.default]
    if track is None:
        return (defaults or tracks)[0]
    if 1 <= track <= len(tracks):
        return tracks[track - 1]
    known = []
    for number, one in enumerate(tracks, 1):
        codec = one.codec_context.name if one.codec_context else "unknown codec"
        about = [one.metadata.get("language"), one.metadata.get("title"), codec]
        about += ["default"] * (one in defaults)
        known.append(f"{number} ({', '.join(filter(None, about))})")
    raise AudioError(f"{name}: no audio track {track}; the file has {', '.join(known)}")


def declared_seconds(track: Track) -> float | None:
    """Length in the header; None where it is missing or invalid."""
    container, stream, found = track.container, track.stream, None
    if stream.duration is not None and stream.time_base is not None:
        found = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        found = container.duration / av.time_base
    return found if found is not None and 0 <= found < math.inf else None


def decoded_frames(track: Track) -> Iterator[AudioFrame]:
    """Frames of the track; packets that cannot be decoded are skipped with a warning."""
    packets, damaged = track.container.demux(track.stream), 0
    while True:
        track.check_time()
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as error:
            track.check_time()
            logger.warning("%s: reading stopped early: %s", track.name, reason(error))
            break
        if packet is None:
            break
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            if frame.rate not in RATES:
                raise AudioError(
                    f"{track.name}: the header has {frame.rate} Hz, and audio {RATES[0]} to "
                    f"{RATES[-1]}: write the file again"
                )
            yield frame  # type: ignore[misc]
    if damaged:
        logger.warning("%s: %d damaged packets were left out", track.name, damaged)


def seek(track: Track, seconds: float) -> None:
    """Seek to the last packet at or before `seconds`, where the format can be searched."""
    stream = track.stream
    assert stream.time_base is not None
    target = int(seconds / stream.time_base) + (stream.start_time or 0)
    with suppress(av.error.FFmpegError):  # then it is read from the current position
        track.container.seek(target, stream=stream)
