"""Training batches without end, from a position that can be saved and gone back to."""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from math import isnan
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int16

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.data.audio_states import AudioStates
from flax_distil.data.augment import AddNoise
from flax_distil.data.batches import (
    PREVIOUS_TOKENS,
    Batch,
    Example,
    bucket_for,
    collate,
    example_draws,
    has_speech,
    longest_prompt,
    make_example,
)
from flax_distil.data.mixing import STREAMED, ExampleKey, TrainingSource, example_keys, rows_by_lane
from flax_distil.data.packing import with_durations
from flax_distil.data.rng import Purpose, generator
from flax_distil.data.streams import LanePlace, Streamed, check_lanes, read_lane
from flax_distil.data.usable import language_reason
from flax_distil.data.utterances import Concatenated, Skipped, Utterance
from flax_distil.data.windows import DecodedClip, decode_clip, prefetch
from flax_distil.data.workers import open_pool
from flax_distil.errors import InputError
from flax_distil.parallel.multihost import from_all_hosts, host_slice
from flax_distil.text.tokens import WhisperTokens

logger = logging.getLogger(__name__)

NOTHING = np.zeros(0, np.int16)  # samples of what is not heard


@dataclass(frozen=True)
class LoaderState:
    """Where training is in its data: with the datasets, all that decides the batches to come.

    `position` counts the examples that were used, over all hosts: neither the batch size nor the
    number of hosts is part of it.
    """

    seed: int = 0
    position: int = 0
    utterances: int = 0
    """How many the datasets have, so that others are noticed; 0 before the first batch."""
    streams: dict[str, Sequence[int]] = field(default_factory=dict)
    """Where the lanes of streams stand, by "source/lane"; a host knows its own."""


class Prepared(NamedTuple):
    """One row before padding: its tokens, its sound, and its seconds: 0 where nothing is learnt."""

    example: Example
    samples: Int16[np.ndarray, "n"]
    seconds: float


class ExampleRow(NamedTuple):
    """What one row of a batch is made of; `utterance` and `before` are there of a stream only."""

    place: ExampleKey
    utterance: Utterance | None = None
    before: Utterance | None = None


@dataclass(frozen=True)
class Loader:
    """What batches are made of; iterate with `batches(state)`.

    Each of `hosts` gets its rows of the same global batches, with the same L.
    """

    sources: tuple[TrainingSource, ...]
    tokens: WhisperTokens
    batch_size: int
    workers: int = 4
    """Threads that decode."""
    processes: int = 0
    """Processes that decode in their place."""
    ahead: int = 2
    """Batches decoded in advance."""
    lanes: int = 1
    """Parts that streams are read in, each by one host."""
    rank: int = 0
    hosts: int = 1
    states: AudioStates | None = None
    """The encoder's output of every utterance, read instead of hearing it."""
    add_noise: AddNoise | None = None
    masks: bool = False
    """Whether batches have keys for SpecAugment."""

    def __post_init__(self):
        """Raises InputError for what would only fail later, in the middle of training."""
        sizes = [source.size for source in self.sources]
        if not sizes or 0 in sizes:
            raise InputError("there is no label to train on")
        for name, among in (("hosts", self.hosts), ("lanes", self._lanes)):
            if self.batch_size % among:
                raise InputError(
                    f"batch {self.batch_size} does not divide over {among} {name}: use "
                    f"{self.batch_size // among * among or among}"
                )
        for source in self.sources:
            if source.size is None:
                check_lanes(source.utterances, self.lanes, self.hosts)  # type: ignore[arg-type]
            else:
                longest = int(source.lengths.max()) + longest_prompt(self.tokens)
                bucket_for(longest, source.options.buckets)

    @property
    def utterances(self) -> Concatenated:
        """The utterances that the row numbers of batches name: all but those of streams."""
        return Concatenated([s.utterances for s in self.sources if s.size is not None])  # type: ignore[misc]

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Full batches, each with the state that continues after it.

        What cannot be heard or has nothing to learn is silence of weight 0.
        """
        processes = 0 if self.states else self.processes  # nothing is decoded then
        pool, prepare = open_pool(self._prepare, self.workers, processes)
        running: deque = deque()
        share = host_slice(self.batch_size, self.rank, self.hosts)
        try:
            for rows, after in self._global_rows(state):
                mine = rows[share]
                prepared = [pool.submit(prepare, state.seed, row) for row in mine]
                running.append((prepared, mine, self._inputs(rows, state.seed), after))
                if len(running) > self.ahead:
                    yield self._collected(*running.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _global_rows(self, state: LoaderState) -> Iterator[tuple[list[ExampleRow], LoaderState]]:
        """All rows of each batch, filled of streams for this host's lanes alone, and what is after.

        Raises InputError for the state of a run on other datasets or lanes.
        """
        size, lanes, utterances = self.batch_size, self._lanes, len(self.utterances)
        if state.position and state.utterances != utterances:
            raise InputError(
                f"the run began on {state.utterances} utterances and there are {utterances}: the "
                "datasets are not those it began with"
            )
        if state.position % lanes:
            raise InputError(
                f"the run stopped after {state.position} examples, which {lanes} lanes do not "
                "divide: go on with the lanes it began with"
            )
        standing = self._standing(state)
        readers = {name: self._reader(state.seed, name, start) for name, start in standing.items()}

        def row(place: ExampleKey) -> ExampleRow:
            reader = readers.get(f"{place.source}/{place.lane}")
            if place.number != STREAMED or reader is None:
                return ExampleRow(place)
            found = next(reader)
            standing[f"{place.source}/{place.lane}"] = found.after
            place = place._replace(passes=found.after.passes, number=found.number)
            return ExampleRow(place, found.utterance, found.before)

        come = example_keys(self.sources, state.seed, state.position, lanes)
        arrangement = rows_by_lane(size, lanes)
        try:
            for position in count(state.position + size, size):
                rows = [row(place) for place in islice(come, size)]
                after = LoaderState(state.seed, position, utterances, dict(standing))
                yield [rows[number] for number in arrangement], after
        finally:
            for reader in readers.values():
                reader.close()

    def _standing(self, state: LoaderState) -> dict[str, LanePlace]:
        """Where this host's lanes of streams stand, by "source/lane"."""
        own = range(self.lanes)[host_slice(self.lanes, self.rank, self.hosts)]
        streams = [number for number, source in enumerate(self.sources) if source.size is None]
        names = [f"{number}/{lane}" for number in streams for lane in own]
        if lacking := [name for name in names if state.position and name not in state.streams]:
            raise InputError(
                f"the run's state does not tell where stream/lane {', '.join(lacking)} stands: go "
                "on with the sources and lanes it began with"
            )
        return {name: LanePlace(*state.streams.get(name, ())) for name in names}

    def _reader(self, seed: int, name: str, start: LanePlace) -> Generator[Streamed]:
        """One lane of a stream from there on, a block ahead."""
        number, lane = map(int, name.split("/"))
        source, block = self.sources[number], max(self.sources[number].buffer // self.lanes, 1)
        stream: Any = source.utterances
        return prefetch(read_lane(stream, lane, self.lanes, block, (seed, number), start), block)

    @property
    def _lanes(self) -> int:
        """1 without streams: any host can read any utterance of a dataset."""
        return self.lanes if any(source.size is None for source in self.sources) else 1

    def _inputs(self, rows: Sequence[ExampleRow], seed: int) -> int:
        """Decoder inputs that the rows need at most, the same on every host.

        Labels of streams are known to their host alone; on several hosts they get the longest
        bucket, on one what they need.
        """
        needed = 0
        for place in (row.place for row in rows):
            source = self.sources[place.source]
            if source.size is None:
                needed = max(needed, max(source.options.buckets) if self.hosts > 1 else 0)
                continue
            inputs = int(source.lengths[place.number]) + longest_prompt(self.tokens)
            if self._prompted(place, seed):
                previous = PREVIOUS_TOKENS
                if not source.own_prompts:
                    previous = min(previous, int(source.lengths[place.number - 1]))
                inputs += 1 + previous
            needed = max(needed, min(inputs, max(source.options.buckets)))
        return needed

    def _prompted(self, place: ExampleKey, seed: int) -> bool:
        """Whether the example is read with the utterance before it in its dataset."""
        source = self.sources[place.source]
        follows = source.own_prompts or bool(source.follows[place.number])
        return follows and example_draws((seed, *place))[1] < source.options.prompt_probability

    def _prepare(self, seed: int, row: ExampleRow) -> Prepared:
        place, utterance, before = row
        source = self.sources[place.source]
        if utterance is None:
            utterance = source.utterances[place.number]  # type: ignore[index]
            if self._prompted(place, seed) and source.follows[place.number]:
                before = source.utterances[place.number - 1]  # type: ignore[index]
        options = source.options
        speech = has_speech(utterance, options.target)
        if speech and not has_target(utterance, options.target):
            return self._left_out(utterance, f"no {options.target} to learn")
        language = utterance.language or options.language
        prompted = speech or options.non_speech == "end"
        if prompted and (reason := language_reason(language, self.tokens)):
            return self._left_out(utterance, reason)
        if before is not None and not has_target(before, options.target):
            before = None
        clip = None if self.states else decode_clip(utterance, place.passes)
        if isinstance(clip, DecodedClip):
            utterance = clip.utterance  # a window's with the times of its sound
        if self.states and (seconds := self.states.parts(self._number(place))):
            utterance = with_durations(utterance, [None if isnan(one) else one for one in seconds])
        targets = make_example(utterance, self.tokens, options, (seed, *place), before)
        if len(targets.tokens) > max(options.buckets):
            return self._left_out(utterance, f"its label has {len(targets.tokens)} tokens")
        if self.states:
            return Prepared(targets, NOTHING, float(self.states.seconds[self._number(place)]))
        assert clip is not None
        if isinstance(clip, Skipped):
            return self._left_out(utterance, clip.reason)._replace(example=targets)
        samples = clip.samples
        if self.add_noise:
            samples = self.add_noise(samples, (seed, *place))
        return Prepared(targets, samples, clip.duration)

    def _left_out(self, utterance: Utterance, reason: str) -> Prepared:
        logger.warning("%s has weight 0: %s", utterance.id, reason)
        return Prepared(Example([self.tokens.sot], [self.tokens.eot], 0), NOTHING, 0.0)

    def _number(self, place: ExampleKey) -> int:
        """The utterance's number among those of all datasets, as `utterances` has them."""
        if self.sources[place.source].size is None:
            return STREAMED
        return place.number + sum(source.size or 0 for source in self.sources[: place.source])

    def _collected(self, running, rows, inputs, after) -> tuple[Batch, LoaderState]:
        examples, sounds, seconds = zip(*(one.result() for one in running), strict=True)
        waveforms = np.zeros((len(rows), 0 if self.states else CLIP_SAMPLES), np.int16)
        for waveform, samples in zip(waveforms, sounds, strict=True):
            waveform[: len(samples)] = samples
        numbers = [self._number(row.place) for row in rows]
        needed = max(inputs, *(len(one.tokens) for one in examples))
        length = bucket_for(needed, self.sources[0].options.buckets)
        audio = self.states.read(numbers) if self.states else None
        keys = None
        if self.masks:
            random = [generator(Purpose.MASKS, after.seed, *row.place) for row in rows]
            keys = np.stack([one.integers(1 << 32, size=2, dtype=np.uint32) for one in random])
        eot = self.tokens.eot
        weighted = any(source.weighs for source in self.sources)
        return (
            collate(examples, waveforms, seconds, numbers, length, eot, audio, keys, weighted),
            after,
        )


def has_target(utterance: Utterance, target: Literal["label", "text"]) -> bool:
    """Whether there is a label or text, of all parts of a window."""
    parts = [one for one in utterance.parts or (utterance,) if has_speech(one, target)]
    if target == "text":
        return all(part.text is not None for part in parts)
    return all((part.token_ids, part.transcript) != (None, None) for part in parts)


def gather_state(state: LoaderState) -> LoaderState:
    """The state with the lanes of every host, for a checkpoint; all hosts call it at once."""
    if not state.streams:
        return state
    streams = {}
    for told in from_all_hosts(state.streams):
        streams |= told
    return replace(state, streams=streams)
