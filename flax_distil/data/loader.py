"""An endless sequence of training batches, which can be continued from any saved position."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from math import ceil, isnan
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int16

from flax_distil.audio import CLIP_SAMPLES
from flax_distil.data.audio_states import ClipStates, StoredAudioStates
from flax_distil.data.augment import AddNoise
from flax_distil.data.batches import (
    PREVIOUS_TOKENS,
    Batch,
    Example,
    bucket_for,
    collate,
    example_draws,
    has_target,
    longest_prompt,
    make_example,
    not_learnable,
)
from flax_distil.data.mixing import (
    STREAMED,
    ExampleKey,
    TrainingSource,
    example_keys,
    rows_by_lane,
)
from flax_distil.data.rng import Purpose, generator
from flax_distil.data.streams import LanePlace, Streamed, check_lanes, read_lane
from flax_distil.data.utterances import Concatenated, Skipped, Utterance
from flax_distil.data.windows import decode_clip, pad_samples, with_durations
from flax_distil.data.workers import open_pool, prefetch
from flax_distil.errors import InputError
from flax_distil.model.dims import POSITIONS_PER_SECOND
from flax_distil.model.generation import WHOLE_WINDOW, fitting_context
from flax_distil.parallel.multihost import from_all_hosts, host_slice
from flax_distil.text.tokens import WhisperTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderState:
    """The position of training in its data; with the datasets it determines all later batches.

    `position` counts the examples used on all hosts, so that batch size and number of hosts may
    change.
    """

    seed: int = 0
    position: int = 0
    utterances: int = 0
    """Size of the datasets, so that a change is noticed; 0 before the first batch."""
    streams: dict[str, Sequence[int]] = field(default_factory=dict)
    """Positions of the lanes of streams, by "source/lane"; a host has those of its own lanes."""


class Prepared(NamedTuple):
    """One row before padding: its tokens, samples and seconds, 0 where nothing is learnt."""

    example: Example
    samples: Int16[np.ndarray, "n"]
    seconds: float


class ExampleRow(NamedTuple):
    """What one row of a batch is made of; `utterance` and `before` are given for streams only."""

    key: ExampleKey
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
    """Processes that decode instead of threads."""
    ahead: int = 2
    """Batches decoded in advance."""
    lanes: int = 1
    """Parts that streams are read in, each by one host."""
    rank: int = 0
    hosts: int = 1
    states: StoredAudioStates | None = None
    """The encoder's output of every utterance, read instead of the audio."""
    add_noise: AddNoise | None = None
    masks: bool = False
    """Whether batches have keys for SpecAugment."""
    contexts: tuple[int, ...] = ()
    """Audio positions, ascending, that the student is given instead of all."""

    def __post_init__(self):
        """Raises InputError for what would only fail in the middle of training."""
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
        """The utterances that the row numbers of batches refer to: all but those of streams."""
        return Concatenated([s.utterances for s in self.sources if s.size is not None])  # type: ignore[misc]

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Full batches, each with the state after it.

        A row that cannot be decoded or has nothing to learn has weight 0.
        """
        processes = 0 if self.states else self.processes  # nothing is decoded then
        pool, prepare = open_pool(self._prepare, self.workers, processes)
        pending: deque[tuple[Callable[[], Batch], LoaderState]] = deque()
        share = host_slice(self.batch_size, self.rank, self.hosts)
        try:
            for rows, after in self._global_rows(state):
                prepared = [pool.submit(prepare, state.seed, row) for row in rows[share]]
                keys = [row.key for row in rows]
                sizes = self._longest(keys, state.seed), self._longest_states(keys)
                collated = partial(self._collate, prepared, keys[share], *sizes, state.seed)
                pending.append((collated, after))
                if len(pending) > self.ahead:
                    collated, after = pending.popleft()
                    yield collated(), after
        finally:
            pool.shutdown(cancel_futures=True)

    # --- which examples -------------------------------------------------------------------------

    def _global_rows(self, state: LoaderState) -> Iterator[tuple[list[ExampleRow], LoaderState]]:
        """All rows of each batch, and the state after it. Rows of streams are read for the lanes of
        this host only.

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
                "divide: resume with the lanes it began with"
            )
        positions = self._lane_positions(state)
        readers = {
            name: self._lane_reader(state.seed, name, start) for name, start in positions.items()
        }

        def read(key: ExampleKey) -> ExampleRow:
            name = f"{key.source}/{key.lane}"
            if key.number != STREAMED or name not in readers:
                return ExampleRow(key)
            streamed = next(readers[name])
            positions[name] = streamed.after
            key = key._replace(passes=streamed.after.passes, number=streamed.number)
            return ExampleRow(key, streamed.utterance, streamed.before)

        keys = example_keys(self.sources, state.seed, state.position, lanes)
        order = rows_by_lane(size, lanes)
        try:
            for position in count(state.position + size, size):
                rows = [read(key) for key in islice(keys, size)]
                after = LoaderState(state.seed, position, utterances, dict(positions))
                yield [rows[number] for number in order], after
        finally:
            for reader in readers.values():
                reader.close()

    def _lane_positions(self, state: LoaderState) -> dict[str, LanePlace]:
        """The positions of this host's lanes of streams, by "source/lane"."""
        own = range(self.lanes)[host_slice(self.lanes, self.rank, self.hosts)]
        streams = [number for number, source in enumerate(self.sources) if source.size is None]
        names = [f"{number}/{lane}" for number in streams for lane in own]
        if missing := [name for name in names if state.position and name not in state.streams]:
            raise InputError(
                f"the run's state has no position for stream/lane {', '.join(missing)}: "
                "resume with the sources and lanes it began with"
            )
        return {name: LanePlace(*state.streams.get(name, ())) for name in names}

    def _lane_reader(self, seed: int, name: str, start: LanePlace) -> Generator[Streamed]:
        """One lane of a stream from a position on, read a block ahead."""
        number, lane = map(int, name.split("/"))
        source, block = self.sources[number], max(self.sources[number].buffer // self.lanes, 1)
        stream: Any = source.utterances
        return prefetch(read_lane(stream, lane, self.lanes, block, (seed, number), start), block)

    @property
    def _lanes(self) -> int:
        """1 without streams: any host can read any utterance of a dataset."""
        return self.lanes if any(source.size is None for source in self.sources) else 1

    def _longest(self, keys: Sequence[ExampleKey], seed: int) -> int:
        """An upper bound of the examples' decoder inputs, the same on every host.

        Labels of streams are known to one host only: on several hosts they get the longest bucket,
        on one what they need.
        """
        longest = 0
        for key in keys:
            source = self.sources[key.source]
            limit = max(source.options.buckets)
            if source.size is None:
                longest = max(longest, limit if self.hosts > 1 else 0)
                continue
            inputs = int(source.lengths[key.number]) + longest_prompt(self.tokens)
            if self._has_prompt(key, seed):
                previous = PREVIOUS_TOKENS
                if not source.own_prompts:
                    previous = min(previous, int(source.lengths[key.number - 1]))
                inputs += 1 + previous
            longest = max(longest, min(inputs, limit))
        return longest

    def _longest_states(self, keys: Sequence[ExampleKey]) -> int:
        """Positions of the longest stored audio states of a batch, on all hosts."""
        return max(self._stored(key).positions for key in keys) if self.states else 0

    def _stored(self, key: ExampleKey) -> ClipStates:
        """Where the stored audio states of an example are."""
        assert self.states is not None
        return self.states.clip(self._number(key), key.passes)

    def _context(self, seed: int, key: ExampleKey, seconds: float) -> int:
        """Audio positions that the student is given of a clip.

        In half of the cases the shortest context that holds it, else a longer one: what a clip gets
        when it is decoded in a batch with longer ones.
        """
        fitting = fitting_context(self.contexts, ceil(seconds * POSITIONS_PER_SECOND))
        longer = [one for one in (*self.contexts, WHOLE_WINDOW) if one > fitting]
        random = generator(Purpose.CONTEXT, seed, *key)
        return fitting if not longer or random.random() < 0.5 else int(random.choice(longer))

    def _has_prompt(self, key: ExampleKey, seed: int) -> bool:
        """Whether the text of the previous utterance is read before the example."""
        source = self.sources[key.source]
        known = source.own_prompts or bool(source.follows[key.number])
        return known and example_draws((seed, *key))[1] < source.options.prompt_probability

    def _number(self, key: ExampleKey) -> int:
        """The utterance's number among those of all datasets, as in `utterances`."""
        if self.sources[key.source].size is None:
            return STREAMED
        return key.number + sum(source.size or 0 for source in self.sources[: key.source])

    # --- what they hold -------------------------------------------------------------------------

    def _prepare(self, seed: int, row: ExampleRow) -> Prepared:
        """One row: read, checked, decoded and tokenised; weight 0 where that fails."""
        key, source = row.key, self.sources[row.key.source]
        utterance, before = row.utterance, row.before
        if utterance is None:
            dataset: Any = source.utterances
            utterance = dataset[key.number]
            if self._has_prompt(key, seed) and source.follows[key.number]:
                before = dataset[key.number - 1]
        if before is not None and not has_target(before, source.options.target):
            before = None
        reason = not_learnable(utterance, source.options, self.tokens)
        samples, seconds = np.zeros(0, np.int16), 0.0
        if not reason and self.states:
            clip = self._stored(key)
            if clip.parts:
                parts = [None if isnan(seconds) else seconds for seconds in clip.parts]
                utterance = with_durations(utterance, parts)
            seconds = clip.seconds
        elif not reason:
            clip = decode_clip(utterance, key.passes)
            if isinstance(clip, Skipped):
                reason = clip.reason
            else:
                utterance, samples, seconds = clip.utterance, clip.samples, clip.duration
                if self.add_noise:
                    samples = self.add_noise(samples, (seed, *key))
        if not reason:
            example = make_example(utterance, self.tokens, source.options, (seed, *key), before)
            if len(example.tokens) <= max(source.options.buckets):
                return Prepared(example, samples, seconds)
            reason = f"its label has {len(example.tokens)} tokens"
        logger.warning("%s has weight 0: %s", utterance.id, reason)
        return Prepared(Example([self.tokens.sot], [self.tokens.eot], 0), samples[:0], 0.0)

    def _collate(
        self,
        prepared: Sequence[Future[Prepared]],
        places: Sequence[ExampleKey],
        inputs: int,
        audio: int,
        seed: int,
    ) -> Batch:
        """The rows of a batch, padded. inputs, audio: decoder inputs and stored audio positions of
        its longest rows on all hosts."""
        examples, samples, seconds = zip(*(one.result() for one in prepared), strict=True)
        numbers = [self._number(key) for key in places]
        states, masks, positions = None, None, None
        if self.contexts:
            positions = list(map(partial(self._context, seed), places, seconds))
        if self.states:
            clips = list(map(self._stored, places))
            states = np.stack([clip.read(audio) for clip in clips])
            positions = [clip.positions for clip in clips] if self.contexts else None
        if self.masks:
            random = [generator(Purpose.MASKS, seed, *key) for key in places]
            masks = np.stack([one.integers(1 << 32, size=2, dtype=np.uint32) for one in random])
        longest = max(inputs, *(len(one.tokens) for one in examples))
        return collate(
            examples,
            pad_samples(samples, 0 if self.states else CLIP_SAMPLES),
            seconds,
            numbers,
            length=bucket_for(longest, self.sources[0].options.buckets),
            eot=self.tokens.eot,
            audio=states,
            keys=masks,
            weighted=any(source.weighs for source in self.sources),
            positions=positions,
        )


def gather_state(state: LoaderState) -> LoaderState:
    """The state with the lanes of every host, for a checkpoint; all hosts call it together."""
    if not state.streams:
        return state
    lanes = [lane for host in from_all_hosts(state.streams) for lane in host.items()]
    return replace(state, streams=dict(lanes))
