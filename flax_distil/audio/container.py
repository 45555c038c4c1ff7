"""Media files opened safely: allowed container formats, no reference followed, one audio track."""

import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

AudioSource = str | Path | bytes | BinaryIO
Opened = tuple[InputContainer, AudioStream]

# FFmpeg's demuxers that read sound from the file itself. Not among them: playlists and lists of
# files (hls, concat, dash, sdp, image sequences, ...), which open whatever they name, devices, and
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
    "enable_drefs": "0",  # of QuickTime: sound in another file
    "use_absolute_path": "0",
}
RATES = range(1_000, 1_000_001)  # Hz that are taken for a sound's; headers of others are damaged
RESTARTS = 0x0200  # AVFMT_TS_DISCONT: the format's clock may begin and go on anywhere


class AudioError(InputError):
    """This audio cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Deadline:
    """A moment after which a file is given up."""

    seconds: float
    end: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """`seconds` from now."""
        return cls(seconds, time.monotonic() + seconds)

    def check(self, name: str) -> None:
        """Raises AudioError when it has passed."""
        if time.monotonic() > self.end:
            raise AudioError(
                f"{name}: not decoded after {self.seconds:g} s: write the file again, or raise the "
                "deadline"
            )


def source_name(source: AudioSource) -> str:
    """What an error message calls this source."""
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio stream"))


def reason(error: BaseException) -> str:
    """FFmpeg's words, without the number and the name that its errors come with."""
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextmanager
def audio_errors(name: str) -> Iterator[None]:
    """Turns whatever FFmpeg and PyAV raise over a damaged file into AudioError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise AudioError(f"{name}: damaged, or no sound ({reason(error)})") from error


@contextmanager
def open_audio(
    source: AudioSource, format: str | None, track: int | None, deadline: Deadline
) -> Iterator[Opened]:
    """An open container and its audio track number `track`, from 1; None is the default track.

    Raises AudioError for what is missing, of another format, without sound or without that track.
    """
    name, protocols = source_name(source), "none"
    if format is not None and format.split(":")[0] not in FORMATS:
        raise AudioError(f"{name}: {format} is no format of sound: use one of {' '.join(FORMATS)}")
    if isinstance(source, (str, Path)):
        check_regular(name, Path(source))
        # Without the scheme, "10:30.wav" would be taken for a protocol called "10".
        source, protocols = f"file:{source}", "file"
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    options = OPTIONS | {"protocol_whitelist": protocols}
    try:
        container = av.open(source, "r", format, options=options, timeout=deadline.seconds)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        deadline.check(name)
        if isinstance(error, av.error.ArgumentError):  # FFmpeg's word for one off the whitelist
            raise AudioError(
                f"{name}: not a file of sound; playlists and lists of files are not followed"
            ) from error
        raise AudioError(
            f"{name}: not an audio file that FFmpeg can read ({reason(error)})"
        ) from error
    with container:
        yield container, choose_track(container, track, name)


def check_regular(name: str, path: Path) -> None:
    """Raises AudioError: no file, or a pipe, device or folder, which may have no end."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read ({reason(error)})") from None
    kind = "not a regular file: copy its sound into one" if there else "there is no such audio file"
    raise AudioError(f"{name}: {kind}")


def choose_track(container: InputContainer, track: int | None, name: str) -> AudioStream:
    """The audio track of that number, or the one that players take."""
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
        raise AudioError(f"{name}: there is no audio track {track}; the file has {known}")
    return tracks[track - 1]


def describe_track(track: AudioStream) -> str:
    """Language, title and codec of a track."""
    known = [track.metadata.get("language"), track.metadata.get("title")]
    codec = track.codec_context.name if track.codec_context else "unknown codec"
    default = "default" if track.disposition & Disposition.default else None
    return ", ".join(filter(None, [*known, codec, default]))


def declared_seconds(opened: Opened) -> float | None:
    """Length as the header tells it, None where it does not or tells nonsense."""
    container, stream = opened
    found = None
    if stream.duration is not None and stream.time_base is not None:
        found = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        found = container.duration / av.time_base
    return found if found is not None and 0 <= found < math.inf else None


def decoded_frames(opened: Opened, name: str, deadline: Deadline) -> Iterator[AudioFrame]:
    """Frames of the track; packets that do not decode are passed over with a warning."""
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
                    f"{name}: the header says {frame.rate} Hz, and sound has {RATES[0]} to "
                    f"{RATES[-1]}: write the file again"
                )
            yield frame  # type: ignore[misc]
    if damaged:
        logger.warning("%s: %d damaged packets were left out", name, damaged)


def seek(opened: Opened, seconds: float) -> None:
    """Go to the last packet at most `seconds` into the track, where the format can be searched."""
    container, stream = opened
    assert stream.time_base is not None
    target = int(seconds / stream.time_base) + (stream.start_time or 0)
    with suppress(av.error.FFmpegError):  # then it is read from where it stands
        container.seek(target, stream=stream)
