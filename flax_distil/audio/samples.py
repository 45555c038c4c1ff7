"""Decoded frames to mono float32 on the recording's timeline, in bounded memory."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.audio.frame import AudioFrame
from jaxtyping import Float32

from flax_distil.audio.container import RESTARTS, AudioError, Track

# Containers whose time stamps are those of playback: a gap in them is silence. Those of other
# formats are computed from the number of samples.
TIMED = {"asf", "flv", "matroska", "mov", "mpeg", "mpegts", "mxf", "nut", "ogg"}
# Deviations of time stamps below JITTER are ignored; above NEW_CLOCK, they are a new clock where
# formats allow it: the defaults of FFmpeg's aresample (min_hard_comp) and -dts_delta_threshold.
JITTER, NEW_CLOCK = 0.1, 10.0  # seconds
# A mean of channels with less than this share of the power of unrelated channels is one of opposite
# phases, in which speech is 10 dB weaker.
CANCELLED = 0.1
STEP_POWER = 2.0**-30  # of the smallest 16-bit sample; below it is silence

# The full scale (1.0) of the sample formats that NumPy converts.
FULL_SCALE = {"s16": 2**15, "s16p": 2**15, "s32": 2**31, "s32p": 2**31, "flt": 1, "fltp": 1}


class SampleBlock(NamedTuple):
    """Samples [channels, n] from sample `index` of a recording at `rate` Hz on."""

    rate: int
    index: int
    samples: Float32[np.ndarray, "channels n"]

    @property
    def end(self) -> int:
        """The index after the last sample."""
        return self.index + self.samples.shape[1]

    def alike(self, other: "SampleBlock") -> bool:
        """Whether both have the same rate and number of channels."""
        return self.rate == other.rate and len(self.samples) == len(other.samples)

    def within(self, start: int, end: int | None) -> "SampleBlock":
        """The samples in [`start`, `end`)."""
        first = min(max(start, self.index), self.end)
        last = self.end if end is None else max(min(end, self.end), first)
        kept = self.samples[:, first - self.index : last - self.index]
        return SampleBlock(self.rate, first, kept)


def place_frames(
    frames: Iterable[AudioFrame], track: Track, seeked: bool = False
) -> Iterator[SampleBlock]:
    """The frames at their places in the recording, with silence in the gaps.

    A file starts at 0, or with its first track where the format's time stamps start anywhere.

    seeked: the frames start in the middle of the recording, at their time stamps; else the first
        frame is its start.
    """
    container, stream = track.container, track.stream
    timed = not TIMED.isdisjoint(container.format.name.split(","))
    restarts = bool(container.format.flags & RESTARTS)  # whether its clock may start again
    tick, origin = stream.time_base or Fraction(1, av.time_base), stream.start_time or 0
    zero = round(Fraction(container.start_time or 0, av.time_base) / tick) if restarts else 0
    if timed and (origin - zero) * tick > JITTER:
        origin = zero
    place, rate, shift = None, 0, 0.0
    for frame, samples in convert_frames(frames):
        time = None if frame.pts is None else (frame.pts - origin) * tick
        if place is None:
            if seeked and time is None:
                return
            place, rate = round(time * frame.rate) if seeked and time is not None else 0, frame.rate
        if rate != frame.rate:
            place, rate = round(place * frame.rate / rate), frame.rate
        if timed and time is not None and abs(gap := float(time) + shift - place / rate) > JITTER:
            if gap < 0 or (restarts and gap > NEW_CLOCK):
                shift -= gap  # continues here; overlapping audio is kept
            elif gap > track.limits.max_seconds:
                raise AudioError(f"{track.name}: its time stamps leave a gap of {gap:.0f} s")
            else:
                for chunk in silence(rate, place, round(gap * rate), len(samples)):
                    yield chunk
                    place = chunk.end
        yield SampleBlock(rate, place, samples)
        place += samples.shape[1]


def silence(rate: int, index: int, count: int, channels: int) -> Iterator[SampleBlock]:
    """`count` samples of silence, a second at a time."""
    for start in range(index, index + count, rate):
        length = min(rate, index + count - start)
        yield SampleBlock(rate, start, np.zeros((channels, length), np.float32))


def convert_frames(
    frames: Iterable[AudioFrame],
) -> Iterator[tuple[AudioFrame, Float32[np.ndarray, "channels n"]]]:
    """Each frame and its samples, in [-1, 1] where the format has a full scale.

    NumPy converts common formats to the same samples as FFmpeg's resampler, and faster.
    """
    convert, form = None, None
    for frame in frames:
        if frame.format.name in FULL_SCALE:
            samples = frame.to_ndarray()  # packed ones as [1, n · channels]
            if frame.format.is_packed:
                samples = samples.reshape(-1, frame.layout.nb_channels).T
            yield frame, samples.astype(np.float32) * np.float32(1 / FULL_SCALE[frame.format.name])
            continue
        if form != (form := (frame.format.name, frame.layout.name, frame.rate)):
            convert = av.AudioResampler(format="fltp")
        assert convert is not None
        for block in convert.resample(frame):
            yield frame, block.to_ndarray()


def split_seconds(chunks: Iterable[SampleBlock], whole: bool = False) -> Iterator[SampleBlock]:
    """The same samples, cut at whole seconds of the recording; `whole`: starting at such a cut.

    A part of a file is cut as the whole file is, so that decisions per second and the resampler's
    phase are the same.
    """
    waiting: list[SampleBlock] = []
    for chunk in chunks:
        if whole:
            begin = -(-chunk.index // chunk.rate) * chunk.rate
            chunk = chunk.within(begin, None)
            if not chunk.samples.size:
                continue
            whole = False
        if waiting and not waiting[0].alike(chunk):
            yield concatenate(waiting)
            waiting = []
        while (cut := chunk.index - chunk.index % chunk.rate + chunk.rate) <= chunk.end:
            yield concatenate([*waiting, chunk.within(chunk.index, cut)])
            waiting, chunk = [], chunk.within(cut, None)
        if chunk.samples.size:
            waiting.append(chunk)
    if waiting:
        yield concatenate(waiting)


def concatenate(chunks: list[SampleBlock]) -> SampleBlock:
    """Consecutive chunks as one, with each channel contiguous in memory."""
    first, last = chunks[0], chunks[-1]
    samples = np.empty((len(first.samples), last.end - first.index), np.float32)
    return first._replace(
        samples=np.concatenate([one.samples for one in chunks], axis=1, out=samples)
    )


def mix_to_mono(chunk: SampleBlock) -> tuple[SampleBlock, bool]:
    """The mean of the channels and False, or the louder one and True where they cancel each other.

    FFmpeg would sum stereo with factors of 1/√2 in float: √2 louder than the mean, which
    soundfile, librosa and FFmpeg's int16 output give.
    """
    channels = len(chunk.samples)
    if channels == 1:
        return chunk, False
    mean = chunk.samples.mean(axis=0, keepdims=True)
    powers = np.array([mean_square(channel) for channel in chunk.samples])
    power = mean_square(mean[0])
    unrelated = powers.sum() / channels**2
    if unrelated < STEP_POWER or power >= CANCELLED * unrelated:  # also where they hold NaN
        return chunk._replace(samples=mean), False
    # The first of equally loud ones, always: the other one has the opposite sign.
    louder = int(np.argmax(powers >= powers.max() / 2))
    return chunk._replace(samples=chunk.samples[louder : louder + 1]), True


def mean_square(samples: Float32[np.ndarray, "n"]) -> float:
    """Mean square."""
    return float(samples @ samples) / max(len(samples), 1)


def resample(chunks: Iterable[SampleBlock], rate: int) -> Iterator[SampleBlock]:
    """One channel at `rate` Hz, at its index there."""
    resampler, place, end = None, 0, (0, 0)
    for chunk in chunks:
        if chunk.rate == rate:
            yield from flush(resampler, rate, place)
            resampler, end = None, (0, 0)
            yield chunk
            continue
        if end != (chunk.rate, chunk.index):
            yield from flush(resampler, rate, place)
            resampler = av.AudioResampler(format="fltp", rate=rate)
            place = round(chunk.index * rate / chunk.rate)
        assert resampler is not None
        samples = np.ascontiguousarray(chunk.samples)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, end = chunk.rate, (chunk.rate, chunk.end)
        for block in resampler.resample(frame):
            yield SampleBlock(rate, place, block.to_ndarray())
            place += block.samples
    yield from flush(resampler, rate, place)


def flush(resampler: av.AudioResampler | None, rate: int, place: int) -> Iterator[SampleBlock]:
    """The samples left in a resampler."""
    for block in resampler.resample(None) if resampler else ():
        yield SampleBlock(rate, place, block.to_ndarray())
        place += block.samples
