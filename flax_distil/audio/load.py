"""Any audio file, or the sound of any video, to 16 kHz mono float32; and back to FLAC bytes."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from jaxtyping import Float32, Int16

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 30 * SAMPLE_RATE  # the window Whisper was trained on

AudioSource = str | Path | bytes | BinaryIO


class AudioError(InputError):
    """This audio cannot be used; the message names it and says why."""


def load_audio(
    source: AudioSource, rate: int = SAMPLE_RATE, format: str | None = None
) -> Float32[np.ndarray, "n"]:
    """Decode, average the channels and resample: float32 in [-1, 1] at `rate` Hz.

    `source` is a path, the bytes of a file, or an open binary file. `format` names the container
    where neither header nor file name tells it: raw G.722 bytes need `format="g722"`.
    A damaged or cut file yields what decodes cleanly, with a warning.
    Raises AudioError when the file is missing, has no audio, decodes to nothing, or holds NaN.
    """
    name = source_name(source)
    with open_audio(source, format) as container:
        # One growing buffer, so that hours of audio cost their own size and little more.
        samples = bytearray()
        for channels in decoded_channels(container, rate, name):
            mono = channels[0] if len(channels) == 1 else channels.mean(axis=0)
            samples += mono.astype(np.float32, copy=False).tobytes()
    waveform = np.frombuffer(samples, np.float32)
    if not waveform.size:
        raise AudioError(f"{name}: no audio could be decoded; is the file empty or damaged?")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: the samples hold NaN or infinity; write the file again")
    return waveform


def audio_duration(source: AudioSource, format: str | None = None) -> float:
    """Length in seconds, from the header where it tells, by decoding where it does not.

    The header's word is not checked: a cut file may claim more than it holds.
    Raises AudioError like `load_audio`.
    """
    name = source_name(source)
    with open_audio(source, format) as container:
        stream = container.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return container.duration / av.time_base
        decoded = decoded_channels(container, SAMPLE_RATE, name)
        return sum(channels.shape[1] for channels in decoded) / SAMPLE_RATE


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


def source_name(source: AudioSource) -> str:
    """What an error message calls this source."""
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        return str(source)
    return str(getattr(source, "name", "audio stream"))


def reason(error: Exception) -> str:
    """FFmpeg's words, without the number and the name that its errors come with."""
    return (getattr(error, "strerror", None) or str(error)).lower()


@contextmanager
def open_audio(source: AudioSource, format: str | None = None) -> Iterator[InputContainer]:
    """A container with at least one audio stream; AudioError when there is none."""
    name = source_name(source)
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            raise AudioError(f"{name}: there is no such audio file")
        # Without the scheme, "10:30.wav" would be taken for a protocol called "10".
        source = f"file:{source}"
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        # A playlist among the files must not open connections.
        container = av.open(source, "r", format=format, options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(
            f"{name}: not an audio file that FFmpeg can read ({reason(error)})"
        ) from error
    with container:
        if not container.streams.audio:
            raise AudioError(f"{name}: the file has no audio stream")
        yield container


def decoded_channels(
    container: InputContainer, rate: int, name: str
) -> Iterator[Float32[np.ndarray, "channels n"]]:
    """Blocks of resampled float32 audio, channels apart; what cannot be decoded is left out.

    The channels are averaged by the caller and not by FFmpeg, which sums stereo into one float
    channel with 1/√2 each: √2 louder than the mean that soundfile, librosa or int16 output give.
    """
    resampler, layout = None, None
    for frame in clean_frames(container, name):
        if resampler and layout != (frame.format.name, frame.layout.name, frame.rate):
            yield from (block.to_ndarray() for block in resampler.resample(None))
            resampler = None
        layout = (frame.format.name, frame.layout.name, frame.rate)
        if frame.rate == rate and frame.format.name in FULL_SCALE:
            yield channels_apart(frame)
            continue
        # Blocks of a second: threads that decode share Python, and each block is a turn of it.
        resampler = resampler or av.AudioResampler(format="fltp", rate=rate, frame_size=rate)
        yield from (block.to_ndarray() for block in resampler.resample(frame))
    if resampler:
        yield from (block.to_ndarray() for block in resampler.resample(None))


# What 1.0 is in the sample formats that need no resampler where the rate is right.
FULL_SCALE = {"s16": 2**15, "s16p": 2**15, "s32": 2**31, "s32p": 2**31, "flt": 1, "fltp": 1}


def channels_apart(frame: AudioFrame) -> Float32[np.ndarray, "channels n"]:
    """A frame's samples in [-1, 1], as FFmpeg converts them."""
    samples = frame.to_ndarray()  # packed ones as [1, n · channels]
    if frame.format.is_packed:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return samples.astype(np.float32) * np.float32(1 / FULL_SCALE[frame.format.name])


def clean_frames(container: InputContainer, name: str) -> Iterator[AudioFrame]:
    """Frames of the first audio stream, passing over packets that do not decode."""
    packets = container.demux(container.streams.audio[0])
    damaged = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError as error:
            logger.warning("%s: reading stopped early: %s", name, reason(error))
            break
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged packets were left out", name, damaged)
