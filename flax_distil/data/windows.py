"""Clips decoded ahead of time, in order, and padded to 30 s: what labelling and evaluation read.

Decoding runs in threads: PyAV releases the GIL inside FFmpeg, threads share the batch's memory, and
unlike processes they start at once and inside any program.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int16

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioError, to_int16
from flax_distil.data.utterances import Skipped, Utterance, listen, to_language
from flax_distil.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A clip of 30 s may leave a resampler or an MP3 decoder a little longer; so much is cut off.
SLACK_SAMPLES = SAMPLE_RATE // 100


@dataclass(frozen=True)
class Clip:
    """An utterance and its samples: at most 30 s, not padded yet."""

    utterance: Utterance
    samples: Int16[np.ndarray, "n"]

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class Windows:
    """Clips padded to 30 s; a short batch is filled up with its last clip, which is not valid.

    Silence would do as well, but a model may write longer about silence than about any clip, and a
    batch is decoded until its last row ends.
    """

    utterances: list[Utterance]
    waveforms: Int16[np.ndarray, "B N"]
    valid: Bool[np.ndarray, "B"]


def in_order(
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


def read_ahead(items: Iterable[Item], count: int) -> Generator[Item]:
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


def hear(utterance: Utterance) -> Clip | Skipped:
    """The decoded clip, or why there is none: damaged, missing, longer than 30 s."""
    try:
        if utterance.language is not None:
            to_language(utterance.language)
        samples = to_int16(listen(utterance))
    except (InputError, OSError) as error:
        return Skipped(utterance.id, str(error))
    if len(samples) > CLIP_SAMPLES + SLACK_SAMPLES:
        seconds = len(samples) / SAMPLE_RATE
        return Skipped(utterance.id, f"too long: {seconds:.2f} s, a window has 30 s")
    return Clip(utterance, samples[:CLIP_SAMPLES])


def stack(clips: Sequence[Clip], batch_size: int) -> Windows:
    """One to `batch_size` clips as one batch of exactly that size."""
    waveforms = np.zeros((batch_size, CLIP_SAMPLES), np.int16)
    for row, clip in zip(waveforms, clips, strict=False):
        row[: len(clip.samples)] = clip.samples
    waveforms[len(clips) :] = waveforms[len(clips) - 1]
    utterances = [clip.utterance for clip in clips]
    return Windows(utterances, waveforms, np.arange(batch_size) < len(clips))


def window_batches(
    utterances: Iterable[Utterance],
    batch_size: int,
    workers: int = 4,
    skipped: Callable[[Skipped], None] | None = None,
) -> Iterator[Windows]:
    """Every utterance once, in order, in batches of one shape; see `Windows` for the last.

    `skipped` is told what could not be heard; without it, the first such clip is an AudioError.
    """

    def heard() -> Iterator[Clip]:
        for clip in in_order(hear, utterances, workers, ahead=2 * batch_size):
            if isinstance(clip, Clip):
                yield clip
            elif skipped is None:
                raise AudioError(f"{clip.id}: {clip.reason}")
            else:
                skipped(clip)

    clips = heard()
    while batch := list(islice(clips, batch_size)):
        yield stack(batch, batch_size)
