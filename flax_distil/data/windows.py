"""Clips decoded ahead of time, in order, and padded to 30 s: what labelling and evaluation read.

Decoding runs in threads: PyAV releases the GIL inside FFmpeg, threads share the batch's memory, and
unlike processes they start at once and inside any program.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int16

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioError, to_int16
from flax_distil.data.packing import with_durations
from flax_distil.data.utterances import Skipped, Utterance, load_waveform
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# A clip of 30 s may leave a resampler or an MP3 decoder a little longer; so much is cut off.
SLACK_SAMPLES = SAMPLE_RATE // 100


@dataclass(frozen=True)
class DecodedClip:
    """An utterance and its samples: at most 30 s, not padded yet."""

    utterance: Utterance
    samples: Int16[np.ndarray, "n"]
    parts: tuple[float | None, ...] = ()
    """Of a packed window: seconds of each planned part, None of one that is not in the clip."""

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class WindowBatch:
    """Clips padded to 30 s; a short batch is filled up with its last clip, which is not valid.

    Silence would do as well, but a model may write longer about silence than about any clip, and a
    batch is decoded until its last row ends.
    """

    utterances: list[Utterance]
    waveforms: Int16[np.ndarray, "B N"]
    valid: Bool[np.ndarray, "B"]


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[Result]:
    """`map` in threads, up to `ahead` items in advance of the consumer; the order is kept."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # also when the consumer leaves early
        pool.shutdown(cancel_futures=True)


def prefetch(items: Iterable[Item], count: int) -> Generator[Item]:
    """The items in order, up to `count` of them read in advance by a thread."""
    pool, end = ThreadPoolExecutor(1, thread_name_prefix="reader"), object()
    source = iter(items)
    running = deque(pool.submit(next, source, end) for _ in range(count))
    try:
        while (item := running.popleft().result()) is not end:
            running.append(pool.submit(next, source, end))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        pool.shutdown(cancel_futures=True)


def decode_clip(utterance: Utterance, turn: int = 0) -> DecodedClip | Skipped:
    """The decoded clip, or why there is none: damaged, missing, longer than 30 s.

    Of a packed window that needs several clips it is one after the other, by `turn`.
    """
    clips = decode_clips(utterance)
    return clips if isinstance(clips, Skipped) else clips[turn % len(clips)]


def decode_clips(utterance: Utterance) -> list[DecodedClip] | Skipped:
    """The clips of an utterance, at least one, or why there is none; see `decode_utterance`.

    Parts of a window that are left out are warned of.
    """
    found = decode_utterance(utterance)
    clips = [one for one in found if isinstance(one, DecodedClip)]
    skipped = [one for one in found if isinstance(one, Skipped)]
    if not clips:
        return Skipped(utterance.id, "; ".join(dict.fromkeys(one.reason for one in skipped)))
    for one in skipped:
        logger.warning("%s is left out of its window: %s", one.id, one.reason)
    return clips


def decode_utterance(utterance: Utterance) -> list[DecodedClip | Skipped]:
    """All clips of an utterance: one, but of a packed window as many as its sound needs.

    What a dataset or a header tells of durations is not always so. The parts of a window have the
    durations of their samples in `Clip.utterance`; where they are longer than the window together,
    those behind 30 s are a clip of their own, and a part that cannot be decoded is left out.
    """
    if not utterance.parts:
        return [_decoded(utterance)]
    decoded = [_decoded(part) for part in utterance.parts]
    pause = round(utterance.pause * SAMPLE_RATE)
    groups: list[dict[int, DecodedClip]] = []  # clips by the number of their part
    room = 0
    for number, clip in enumerate(decoded):
        if isinstance(clip, Skipped):
            continue
        room -= pause + len(clip.samples)
        if not groups or room < 0:
            groups.append({})
            room = CLIP_SAMPLES + SLACK_SAMPLES - len(clip.samples)
        groups[-1][number] = clip
    clips = [_window(utterance, group) for group in groups]
    return [*clips, *(one for one in decoded if isinstance(one, Skipped))]


def _window(window: Utterance, clips: dict[int, DecodedClip]) -> DecodedClip:
    """Some parts of a window one after the other, with the times that they have there."""
    pause = np.zeros(round(window.pause * SAMPLE_RATE), np.int16)
    pieces = [piece for clip in clips.values() for piece in (pause, clip.samples)]
    samples = np.concatenate(pieces[1:])[:CLIP_SAMPLES]
    numbers = range(len(window.parts))
    seconds = tuple(clips[one].duration if one in clips else None for one in numbers)
    return DecodedClip(with_durations(window, seconds), samples, seconds)


def _decoded(utterance: Utterance) -> DecodedClip | Skipped:
    """One clip, of which no more is decoded than shows that it is too long."""
    longest = CLIP_SAMPLES // SAMPLE_RATE + 1
    try:
        samples = to_int16(load_waveform(utterance, longest))
    except (InputError, OSError) as error:
        return Skipped(utterance.id, str(error))
    if len(samples) > CLIP_SAMPLES + SLACK_SAMPLES:
        seconds = len(samples) / SAMPLE_RATE
        more = " or more" if seconds >= longest else ""
        return Skipped(utterance.id, f"too long: {seconds:.2f} s{more}, a window has 30 s")
    return DecodedClip(utterance, samples[:CLIP_SAMPLES])


def pad_clips(clips: Sequence[DecodedClip], batch_size: int) -> WindowBatch:
    """One to `batch_size` clips as one batch of exactly that size."""
    waveforms = np.zeros((batch_size, CLIP_SAMPLES), np.int16)
    for row, clip in zip(waveforms, clips, strict=False):
        row[: len(clip.samples)] = clip.samples
    waveforms[len(clips) :] = waveforms[len(clips) - 1]
    utterances = [clip.utterance for clip in clips]
    return WindowBatch(utterances, waveforms, np.arange(batch_size) < len(clips))


def window_batches(
    utterances: Iterable[Utterance],
    batch_size: int,
    workers: int = 4,
    skipped: Callable[[Skipped], None] | None = None,
) -> Iterator[WindowBatch]:
    """Every utterance once, in order, in batches of one shape; see `WindowBatch` for the last.

    `skipped` is told what could not be heard; without it, the first such clip is an AudioError.
    """

    def heard() -> Iterator[DecodedClip]:
        for found in map_in_order(decode_utterance, utterances, workers, ahead=2 * batch_size):
            for clip in found:
                if isinstance(clip, DecodedClip):
                    yield clip
                elif skipped is None:
                    raise AudioError(f"{clip.id}: {clip.reason}")
                else:
                    skipped(clip)

    clips = heard()
    while batch := list(islice(clips, batch_size)):
        yield pad_clips(batch, batch_size)
