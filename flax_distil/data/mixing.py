"""Any number of datasets as one sequence of examples, which seed and weights alone decide.

Which source the p-th example of a run comes from is drawn by a generator that seed and p determine,
and which of its utterances from how often the source was drawn before. So a position, one number,
is all that continuing needs, on any number of hosts. Streams keep a place of their own
(`streams.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from flax_distil.config import DistillConfig, TrainingDataConfig
from flax_distil.data.batches import TargetOptions, label_ids
from flax_distil.data.chance import Purpose, generator
from flax_distil.data.packing import Packed, length, pack
from flax_distil.data.utterances import (
    Joined,
    Utterance,
    Utterances,
    UtteranceStream,
    read_dataset,
)
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

BLOCK = 1 << 16  # draws that one generator makes
HEARD_FOR_HOURS = 200  # clips whose headers are read where a dataset does not tell durations


STREAMED = -1  # stands for the number of an utterance of a stream


class Place(NamedTuple):
    """One example of a run; with the run's seed, the seed of all that is random about it."""

    source: int
    lane: int
    """Of the stream; 0 of a dataset."""
    passes: int
    """Over the dataset, or the lane of a stream, before."""
    number: int
    """Of the utterance."""


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture, and how it is taught."""

    utterances: Sequence[Utterance] | UtteranceStream
    options: TargetOptions
    lengths: Int[np.ndarray, "n"]
    """Tokens of each label, at most; none of a stream."""
    follows: Bool[np.ndarray, "n"]
    """Whether the utterance before is the one spoken before."""
    weight: float = 1.0
    buffer: int = 2_000
    """Utterances of a stream that are shuffled at a time."""

    @property
    def size(self) -> int | None:
        """Utterances in it, None of a stream."""
        return None if isinstance(self.utterances, UtteranceStream) else len(self.utterances)


def training_sources(config: DistillConfig, tokens: WhisperTokens) -> tuple[Source, ...]:
    """What `labels` and `data` of a run name, opened.

    Raises InputError for datasets that cannot be read, have nothing to learn, or are mixed with a
    stream whose weight is not given.
    """
    options = TargetOptions(
        config.label_buckets,
        config.timestamp_probability,
        config.language,
        prompt_probability=config.prompt_probability,
        stored=config.stored_teacher,
    )
    tables = config.data
    alone = len(tables) + bool(config.labels) == 1
    sources = [open_source(table, options, tokens, alone) for table in tables]
    if config.labels:
        parts = [
            open_source(TrainingDataConfig(str(path), target="label"), options, tokens, alone=True)
            for path in config.labels
        ]
        sources.insert(0, joined(parts, alone))
    if not sources:
        raise InputError("name at least one label store (--labels) or a [[distill.data]] table")
    prompted = config.prompt_probability and any(source.follows.any() for source in sources)
    if config.stored_teacher and prompted:
        raise InputError(
            "stored_teacher read no previous text, and prompt_probability is "
            f"{config.prompt_probability:g}: set it to 0"
        )
    return tuple(sources)


def open_source(
    config: TrainingDataConfig, options: TargetOptions, tokens: WhisperTokens, alone: bool = False
) -> Source:
    """One dataset. Its hours are its weight where none is given and it is not `alone`."""
    utterances = read_dataset(config)
    target = config.target or ("label" if utterances.columns.labelled else "text")
    if target == "text" and utterances.columns.text is None:
        raise InputError(
            f"{config.source} has neither token_ids nor a column that looks like text: label it "
            "with pseudo-label, or name its text_column"
        )
    if target == "label" and not utterances.columns.labelled:
        raise InputError(f"{config.source} has no token_ids: label it with pseudo-label")
    if config.weight is not None and config.weight <= 0:
        raise InputError(f"{config.source} has weight {config.weight:g}: it must be positive")
    options = replace(options, task=config.task, target=target)
    if isinstance(utterances, UtteranceStream):
        return _stream_source(config, utterances, options, alone)
    lengths = label_lengths(utterances, tokens, target)
    windows: Utterances | Packed = utterances
    if config.pack_seconds is not None:
        windows = pack(utterances, config.pack_seconds, config.pack_pause)
        lengths = np.array([sum(lengths[list(rows)]) + 2 * len(rows) for rows in windows.groups])
    weight = config.weight or (1.0 if alone else hours(utterances))
    return Source(windows, options, lengths, windows.follows(), weight)


def _stream_source(
    config: TrainingDataConfig, stream: UtteranceStream, options: TargetOptions, alone: bool
) -> Source:
    if config.weight is None and not alone:
        raise InputError(f"the hours of {config.source} are not known, it is a stream: give weight")
    if config.limit is not None or config.pack_seconds is not None:
        raise InputError(
            f"{config.source} is a stream: leave out limit and pack_seconds, or streaming"
        )
    none = np.zeros(0, np.int32)
    return Source(stream, options, none, none > 0, config.weight or 1.0, config.shuffle_buffer)


def joined(parts: Sequence[Source], alone: bool = False) -> Source:
    """Datasets that are drawn as one: each utterance once before any comes again."""
    return Source(
        Joined([part.utterances for part in parts]),  # type: ignore[misc]
        parts[0].options,
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.follows for part in parts]),
        1.0 if alone else sum(hours(part.utterances) for part in parts),  # type: ignore[arg-type]
    )


def label_lengths(utterances: Utterances, tokens: WhisperTokens, target: str) -> np.ndarray:
    """int[n]: tokens of what is learnt, read without the audio."""
    if target == "label":
        return utterances.label_lengths()
    texts = utterances.column(utterances.columns.text or "")
    said = (Utterance("", b"", str(text or "")) for text in texts)
    # 1: without the space that most languages begin with, a text may have a token more
    return np.array([len(label_ids(one, tokens, "text")) + 1 for one in said], np.int32)


def hours(utterances: Utterances) -> float:
    """Hours of speech: as the dataset tells, else estimated from clips spread over it."""
    told = [seconds for seconds in utterances.column("duration") if seconds is not None]
    if len(told) < len(utterances):
        step = max(len(utterances) // HEARD_FOR_HOURS, 1)
        told = [length(utterances[row]) for row in range(0, len(utterances), step)]
    mean = sum(map(float, told)) / max(len(told), 1)
    if mean == 0:
        raise InputError(f"the hours of {utterances.config.source} are not known: give its weight")
    return mean * len(utterances) / 3600


# --- order --------------------------------------------------------------------------------------


def draws(weights: Sequence[float], seed: int, position: int) -> Iterator[tuple[int, int]]:
    """From the `position`-th example of a run on: its source, and how many it gave before."""
    edges = np.cumsum(weights) / np.sum(weights)
    edges[-1] = 1.0  # not a rounding error below
    before = np.zeros(len(weights), np.int64)
    for block in count():
        random = generator(Purpose.SOURCE, seed, block).random(BLOCK)
        chosen = np.searchsorted(edges, random, side="right")
        if (block + 1) * BLOCK <= position:
            before += np.bincount(chosen, minlength=len(weights))
            continue
        for number, source in enumerate(chosen.tolist(), block * BLOCK):
            if number >= position:
                yield source, int(before[source])
            before[source] += 1


def places(sources: Sequence[Source], seed: int, position: int, lanes: int = 1) -> Iterator[Place]:
    """From the `position`-th example of a run on: where each stands.

    Every dataset is passed over again and again, each utterance once a pass. Of streams the lane is
    told, p mod `lanes`; what comes next there, its host knows.
    """
    orders: dict[int, tuple[int, np.ndarray]] = {}
    drawn = draws([source.weight for source in sources], seed, position)
    for example, (source, before) in enumerate(drawn, position):
        size = sources[source].size
        if size is None:
            yield Place(source, example % lanes, 0, STREAMED)
            continue
        passes, at = divmod(before, size)
        if source not in orders or orders[source][0] != passes:
            orders[source] = passes, pass_order(size, seed, source, passes)
        yield Place(source, 0, passes, int(orders[source][1][at]))


def pass_order(size: int, seed: int, source: int, passes: int) -> Int[np.ndarray, "n"]:
    """The order of a pass over a dataset: a permutation that the three numbers decide."""
    return generator(Purpose.PASS, seed, source, passes).permutation(size)


def rows_by_lane(batch_size: int, lanes: int) -> Int[np.ndarray, "B"]:
    """Which example of a batch stands in each row: the p-th belongs to lane p mod `lanes`, and a
    lane's rows lie together, so that each host has whole lanes."""
    return np.arange(batch_size).reshape(-1, lanes).T.reshape(-1)
