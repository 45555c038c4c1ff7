"""Training batches without end, from a position that can be saved and gone back to."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Int, Int16

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.data.audio_states import AudioStates
from flax_distil.data.batches import (
    Batch,
    Example,
    TargetOptions,
    bucket_for,
    collate,
    example,
    longest_prompt,
)
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import hear
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderState:
    """Where training is in its data: with the dataset, all that decides the batches to come.

    `position` counts the epoch's examples that were used, over all hosts: neither the batch size
    nor the number of hosts is part of it.
    """

    seed: int = 0
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Loader:
    """What batches are made of; iterate with `batches(state)`.

    `lengths` are the labels' token counts, `label_lengths()` of the dataset. Each of `hosts` gets
    its rows of the same global batches, with the same L.
    """

    utterances: Sequence[Utterance]
    lengths: Int[np.ndarray, "n"]
    tokens: WhisperTokens
    options: TargetOptions
    batch_size: int
    workers: int = 4
    ahead: int = 2
    """Batches decoded in advance."""
    rank: int = 0
    hosts: int = 1
    states: AudioStates | None = None
    """The encoder's output of every utterance, read instead of hearing it."""

    def __post_init__(self):
        """Raises InputError for what would only fail later, in the middle of training."""
        if not len(self.utterances):
            raise InputError("there is no label to train on")
        if self.batch_size % self.hosts:
            raise InputError(
                f"batch {self.batch_size} does not divide over {self.hosts} hosts: use "
                f"{self.batch_size // self.hosts * self.hosts or self.hosts}"
            )
        bucket_for(self._inputs(range(len(self.lengths))), self.options.buckets)

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Full batches, each with the state that continues after it.

        An epoch passes over every utterance once, in an order of its own. Batches run on over its
        end, so that none is left out. A clip that cannot be heard is silence of weight 0.
        """
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        running: deque = deque()
        share = self.batch_size // self.hosts
        try:
            for places, after in global_batches(len(self.utterances), self.batch_size, state):
                length = bucket_for(self._inputs([n for _, n in places]), self.options.buckets)
                mine = places[self.rank * share : (self.rank + 1) * share]
                waveforms = np.zeros((share, 0 if self.states else CLIP_SAMPLES), np.int16)
                rows = [
                    pool.submit(self._prepare, (state.seed, epoch, number), waveform)
                    for (epoch, number), waveform in zip(mine, waveforms, strict=True)
                ]
                running.append((rows, mine, waveforms, length, after))
                if len(running) > self.ahead:
                    yield self._collected(*running.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _inputs(self, numbers: Sequence[int]) -> int:
        """Decoder inputs that the longest of these labels needs."""
        return int(self.lengths[np.asarray(numbers)].max()) + longest_prompt(self.tokens)

    def _prepare(
        self, seed: tuple[int, int, int], waveform: Int16[np.ndarray, "N"]
    ) -> tuple[Example, float]:
        """Fill one row's waveform; its tokens and its seconds."""
        utterance = self.utterances[seed[-1]]
        targets = example(utterance, self.tokens, self.options, seed)
        if self.states:
            return targets, float(self.states.seconds[seed[-1]])
        clip = hear(utterance)
        if isinstance(clip, Skipped):
            logger.warning("%s has weight 0: %s", clip.id, clip.reason)
            return targets, 0.0
        waveform[: len(clip.samples)] = clip.samples
        return targets, clip.duration

    def _collected(self, rows, places, waveforms, length, after) -> tuple[Batch, LoaderState]:
        examples, seconds = zip(*(row.result() for row in rows), strict=True)
        numbers = [number for _, number in places]
        audio = self.states.states[numbers] if self.states else None
        batch = collate(examples, waveforms, seconds, numbers, length, self.tokens.eot, audio)
        return batch, after


def epoch_order(size: int, seed: int, epoch: int) -> Int[np.ndarray, "n"]:
    """The order of an epoch's examples: a permutation that seed and epoch alone decide."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(
        size
    )


def global_batches(
    size: int, batch_size: int, state: LoaderState
) -> Iterator[tuple[list[tuple[int, int]], LoaderState]]:
    """`batch_size` pairs (epoch, utterance) at a time, over all hosts, and the state after them.

    Raises InputError for a state that lies outside a dataset of `size` utterances.
    """
    if not 0 <= state.position <= size:
        raise InputError(
            f"the run stopped after {state.position} examples of an epoch, the dataset has {size}: "
            "it is not the one the run began with"
        )
    batch: list[tuple[int, int]] = []
    for epoch in count(state.epoch):
        order = epoch_order(size, state.seed, epoch)
        first = state.position if epoch == state.epoch else 0
        for position in range(first, size):
            batch.append((epoch, int(order[position])))
            if len(batch) == batch_size:
                yield batch, LoaderState(state.seed, epoch, position + 1)
                batch = []
