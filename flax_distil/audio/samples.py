"""Decoded frames to one channel of float32 on the recording's timeline, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.audio.frame import AudioFrame
from jaxtyping import Float32

from flax_distil.audio.container import RESTARTS, AudioError, Opened

# Containers whose time stamps say when sound is heard: silence stands where they leave a gap. Those
# of other formats are made up from the number of samples.
TIMED = {"asf", "flv", "matroska", "mov", "mpeg", "mpegts", "mxf", "nut", "ogg"}
# A deviation of the time stamps that is no gap, and one that is a new clock where a format allows
# that: the defaults of FFmpeg's aresample (min_hard_comp) and -dts_delta_threshold.
JITTER, NEW_CLOCK = 0.1, 10.0  # seconds
# A mean of channels that has less than this share of the power that it would have of unrelated
# ones is a mean of opposite phases: speech in it is 10 dB weaker than beside it.
CANCELLED = 0.1
STEP_POWER = 2.0**-30  # of sound at the step of 16-bit samples; what is below it is silence

# What 1.0 is in the sample formats that numpy converts.
FULL_SCALE = {"s16": 2**15, "s16p": 2**15, "s32": 2**31, "s32p": 2**31, "flt": 1, "fltp": 1}


class Chunk(NamedTuple):
    """Samples (channels, n) that begin at sample `index` of a recording at `rate` Hz."""

    rate: int
    index: int
    samples: Float32[np.ndarray, "channels n"]

    @property
    def end(self) -> int:
        """The sample behind the last."""
        return self.index + self.samples.shape[1]

    def alike(self, other: "Chunk") -> bool:
        """Whether both have one rate and number of channels."""
        return self.rate == other.rate and len(self.samples) == len(other.samples)

    def within(self, start: int, end: int | None) -> "Chunk":
        """What of it lies from sample `start` to before `end`."""
        first = min(max(start, self.index), self.end)
        last = self.end if end is None else max(min(end, self.end), first)
        kept = self.samples[:, first - self.index : last - self.index]
        return Chunk(self.rate, first, kept)


@dataclass(frozen=True)
class TrackClock:
    """How time stamps of a track become seconds of the recording."""

    timed: bool
    """Whether a gap between time stamps is silence."""
    restarts: bool
    """Whether time stamps may begin again in the middle."""
    tick: Fraction
    """Seconds of a time stamp's unit."""
    origin: int
    """Time stamp of the recording's beginning."""

    @classmethod
    def of(cls, opened: Opened) -> "TrackClock":
        """The clock of a track: a file begins at 0, or with its first track where the format's
        time stamps begin anywhere."""
        container, stream = opened
        timed = not TIMED.isdisjoint(container.format.name.split(","))
        restarts = bool(container.format.flags & RESTARTS)
        tick, start = stream.time_base or Fraction(1, av.time_base), stream.start_time or 0
        zero = round(Fraction(container.start_time or 0, av.time_base) / tick) if restarts else 0
        late = timed and (start - zero) * tick > JITTER
        return cls(timed, restarts, tick, zero if late else start)

    def seconds(self, frame: AudioFrame) -> float | None:
        """Where in the recording a frame begins, as far as it tells."""
        if frame.pts is None:
            return None
        return (frame.pts - self.origin) * float(self.tick)

    def index(self, frame: AudioFrame) -> int | None:
        """The same as a number of samples."""
        if frame.pts is None:
            return None
        return round((frame.pts - self.origin) * self.tick * frame.rate)


def place_frames(
    frames: Iterable[AudioFrame], clock: TrackClock, name: str, longest: float, sought: bool = False
) -> Iterator[Chunk]:
    """The frames where the recording has them, with silence in the gaps.

    longest: seconds of a gap that is believed. sought: the frames begin in the middle of the
    recording, where their time stamps tell; else the first one is its beginning.
    """
    place, rate, shift = None, 0, 0.0
    for frame, samples in convert_frames(frames):
        if place is None:
            place, rate = clock.index(frame) if sought else 0, frame.rate
            if place is None:
                return
        if rate != frame.rate:
            place, rate = round(place * frame.rate / rate), frame.rate
        time = clock.seconds(frame) if clock.timed else None
        if time is not None and abs(gap := time + shift - place / rate) > JITTER:
            if gap < 0 or (clock.restarts and gap > NEW_CLOCK):
                shift -= gap  # goes on where it is; sound that overlaps is kept
            elif gap > longest:
                raise AudioError(f"{name}: its time stamps leave a gap of {gap:.0f} s")
            else:
                for piece in silence(rate, place, round(gap * rate), len(samples)):
                    yield piece
                    place = piece.end
        yield Chunk(rate, place, samples)
        place += samples.shape[1]


def silence(rate: int, index: int, count: int, channels: int) -> Iterator[Chunk]:
    """`count` samples of silence, a second at a time."""
    for start in range(index, index + count, rate):
        length = min(rate, index + count - start)
        yield Chunk(rate, start, np.zeros((channels, length), np.float32))


def convert_frames(
    frames: Iterable[AudioFrame],
) -> Iterator[tuple[AudioFrame, Float32[np.ndarray, "channels n"]]]:
    """Each frame and its samples, in [-1, 1] where the format has a full scale."""
    convert, form = None, None
    for frame in frames:
        if frame.format.name in FULL_SCALE:
            yield frame, frame_samples(frame)
            continue
        if form != (form := (frame.format.name, frame.layout.name, frame.rate)):
            convert = av.AudioResampler(format="fltp")
        assert convert is not None
        for block in convert.resample(frame):
            yield frame, block.to_ndarray()


def frame_samples(frame: AudioFrame) -> Float32[np.ndarray, "channels n"]:
    """A frame's samples in [-1, 1], as FFmpeg converts them."""
    samples = frame.to_ndarray()  # packed ones as [1, n · channels]
    if frame.format.is_packed:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return samples.astype(np.float32) * np.float32(1 / FULL_SCALE[frame.format.name])


def split_seconds(pieces: Iterable[Chunk], whole: bool = False) -> Iterator[Chunk]:
    """The same samples, cut at the recording's whole seconds; `whole`: begins with such a cut.

    Where a part of a file is decoded the cuts are those of the whole file, so that what is decided
    a second at a time is decided alike, and a resampler's phase is the same.
    """
    waiting: list[Chunk] = []
    for piece in pieces:
        if whole:
            begin = -(-piece.index // piece.rate) * piece.rate
            piece = piece.within(begin, None)
            if not piece.samples.size:
                continue
            whole = False
        if waiting and not waiting[0].alike(piece):
            yield concatenate(waiting)
            waiting = []
        while (cut := piece.index - piece.index % piece.rate + piece.rate) <= piece.end:
            yield concatenate([*waiting, piece.within(piece.index, cut)])
            waiting, piece = [], piece.within(cut, None)
        if piece.samples.size:
            waiting.append(piece)
    if waiting:
        yield concatenate(waiting)


def concatenate(pieces: list[Chunk]) -> Chunk:
    """Pieces that follow each other as one, each channel in a row of memory."""
    first, last = pieces[0], pieces[-1]
    samples = np.empty((len(first.samples), last.end - first.index), np.float32)
    return first._replace(
        samples=np.concatenate([one.samples for one in pieces], axis=1, out=samples)
    )


def mix_to_mono(piece: Chunk) -> tuple[Chunk, bool]:
    """The mean of the channels; or, where they cancel each other, the louder of them, and True.

    The channels are averaged here and not by FFmpeg, which sums stereo into one float channel with
    1/√2 each: √2 louder than the mean that soundfile, librosa or int16 output give.
    """
    channels = len(piece.samples)
    if channels == 1:
        return piece, False
    mean = piece.samples.mean(axis=0, keepdims=True)
    powers = np.array([mean_square(channel) for channel in piece.samples])
    power = mean_square(mean[0])
    unrelated = powers.sum() / channels**2
    if unrelated < STEP_POWER or power >= CANCELLED * unrelated:  # also where they hold NaN
        return piece._replace(samples=mean), False
    # Of equally loud ones always the first: the other one has the opposite sign.
    louder = int(np.argmax(powers >= powers.max() / 2))
    return piece._replace(samples=piece.samples[louder : louder + 1]), True


def mean_square(samples: Float32[np.ndarray, "n"]) -> float:
    """Mean square."""
    return float(samples @ samples) / max(len(samples), 1)


def resample(pieces: Iterable[Chunk], rate: int) -> Iterator[Chunk]:
    """One channel at `rate` Hz, in its place there."""
    resampler, place, end = None, 0, (0, 0)
    for piece in pieces:
        if piece.rate == rate:
            yield from flush(resampler, rate, place)
            resampler, end = None, (0, 0)
            yield piece
            continue
        if end != (piece.rate, piece.index):
            yield from flush(resampler, rate, place)
            resampler = av.AudioResampler(format="fltp", rate=rate)
            place = round(piece.index * rate / piece.rate)
        assert resampler is not None
        samples = np.ascontiguousarray(piece.samples)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, end = piece.rate, (piece.rate, piece.end)
        for block in resampler.resample(frame):
            yield Chunk(rate, place, block.to_ndarray())
            place += block.samples
    yield from flush(resampler, rate, place)


def flush(resampler: av.AudioResampler | None, rate: int, place: int) -> Iterator[Chunk]:
    """What a resampler still holds."""
    for block in resampler.resample(None) if resampler else ():
        yield Chunk(rate, place, block.to_ndarray())
        place += block.samples
