"""A mixture of datasets as one sequence of examples, determined by seed and weights.

Seed and position p determine the source of the p-th example of a run, and the number of earlier
examples of that source determines the utterance. So a run is resumed from one number, on any number
of hosts. Streams have positions of their own (`streams.py`).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from flax_distil.config import DistillConfig, TrainingDataConfig
from flax_distil.data.batches import TargetOptions, label_ids, language_reason, longest_prompt
from flax_distil.data.rng import Purpose, generator
from flax_distil.data.table import cell_bool
from flax_distil.data.utterances import (
    Concatenated,
    Utterance,
    Utterances,
    UtteranceStream,
    read_dataset,
)
from flax_distil.data.windows import Packed, clip_seconds, pack
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens, strip_special

log = logging.getLogger(__name__)

DRAWS_PER_BLOCK = 1 << 16  # draws of one generator
CLIPS_FOR_HOURS = 200  # headers that are read of a dataset without durations
STREAMED = -1  # in the place of an utterance's number, of a stream


class ExampleKey(NamedTuple):
    """Identifies an example of a run; with the run's seed, it seeds all that is random in it."""

    source: int
    lane: int
    """Of the stream; 0 for a dataset."""
    passes: int
    """Completed passes over the dataset or the lane."""
    number: int
    """Of the utterance."""


@dataclass(frozen=True)
class TrainingSource:
    """One dataset of a mixture, and how targets are made of it."""

    utterances: Sequence[Utterance] | UtteranceStream
    options: TargetOptions
    lengths: Int[np.ndarray, "n"] = field(default_factory=lambda: np.zeros(0, int))
    """Upper bound of each label's tokens; empty for a stream."""
    follows: Bool[np.ndarray, "n"] = field(default_factory=lambda: np.zeros(0, bool))
    """Whether the previous row is the previous utterance of the recording."""
    weight: float | None = 1.0
    """Relative to the others; None until it is known."""
    buffer: int = 2_000
    """Utterances of a stream in a shuffled block."""
    speech: bool = True
    """Whether its clips hold speech."""
    own_prompts: bool = False
    """Whether its rows hold the previous text (`Utterance.previous`)."""

    @property
    def weighs(self) -> bool:
        """Whether its examples need factors of KL and cross-entropy."""
        uniform = self.speech and self.size is not None  # streams may mix speech and non-speech
        return not uniform or (self.options.kl, self.options.ce) != (1.0, 1.0)

    @property
    def size(self) -> int | None:
        """Number of utterances; None for a stream."""
        return None if isinstance(self.utterances, UtteranceStream) else len(self.utterances)


def training_sources(config: DistillConfig, tokens: WhisperTokens) -> tuple[TrainingSource, ...]:
    """The sources of a run's `labels` and `data`; clips without speech are separate sources.

    Raises:
        InputError: a dataset cannot be read or has nothing to learn, or a stream in a mixture has
            no weight.
    """
    options = TargetOptions(
        config.label_buckets,
        config.timestamp_probability,
        config.language,
        prompt_probability=config.prompt_probability,
        teacher_states=config.stored_teacher,
        non_speech=config.non_speech,
    )
    stores = [
        source
        for path in config.labels
        for source in open_source(TrainingDataConfig(str(path), target="label"), options, tokens)
    ]
    kinds = ([one for one in stores if one.speech is speech] for speech in (True, False))
    sources = [concatenate_sources(parts) for parts in kinds if parts]
    sources += [one for table in config.data for one in open_source(table, options, tokens)]
    if not sources:
        raise InputError("name at least one label store (--labels) or a [[distill.data]] table")
    prompted = any(source.follows.any() or source.own_prompts for source in sources)
    if config.stored_teacher and config.prompt_probability and prompted:
        raise InputError(
            "stored_teacher has states without previous text, and prompt_probability is "
            f"{config.prompt_probability:g}: set it to 0"
        )
    return with_weights(sources, config.non_speech_share)


def open_source(
    config: TrainingDataConfig, options: TargetOptions, tokens: WhisperTokens
) -> tuple[TrainingSource, ...]:
    """The sources of one dataset: its clips with speech, and those without."""
    utterances = read_dataset(config)
    columns = utterances.columns
    labelled = columns.labelled or columns.transcript is not None
    target = config.target or ("label" if labelled else "text")
    if target == "text" and columns.text is None and config.speech:
        raise InputError(
            f"{config.source} has neither token_ids nor a column that looks like text: label it "
            "with pseudo-label, or name its text_column"
        )
    if target == "label" and not labelled and config.speech:
        raise InputError(f"{config.source} has no token_ids: label it with pseudo-label")
    if config.weight is not None and config.weight <= 0:
        raise InputError(f"{config.source} has weight {config.weight:g}: it must be positive")
    if config.task == "translate" and not tokens.multilingual:
        raise InputError(
            f"{config.source} is to be translated, and the student is English-only: use a "
            "multilingual teacher and student"
        )
    options = replace(options, task=config.task, target=target, kl=config.kl, ce=config.ce)
    if isinstance(utterances, UtteranceStream):
        if config.limit is not None or config.pack_seconds is not None:
            raise InputError(
                f"{config.source} is a stream: leave out limit and pack_seconds, or streaming"
            )
        source = TrainingSource(utterances, options, weight=config.weight, speech=config.speech)
        return (replace(source, buffer=config.shuffle_buffer),)
    packed = config.pack_seconds is not None
    lengths = label_lengths(utterances, tokens, target)
    kinds = usable_rows(utterances, lengths, options, tokens, packed)
    sources = []
    for speech, numbers in zip((True, False), kinds, strict=True):
        if not len(numbers):
            continue
        windows = part = utterances.take(numbers)
        most = np.maximum(lengths[numbers], 0) * speech
        if config.pack_seconds is not None:
            windows = pack(part, config.pack_seconds, config.pack_pause)
            most = np.array([sum(most[list(rows)]) + 2 * len(rows) for rows in windows.groups])
        prompts = () if packed else part.column("condition_on_prev")
        sources.append(
            TrainingSource(
                windows,
                options,
                most,
                windows.follows(),
                config.weight and config.weight * len(numbers) / sum(map(len, kinds)),
                speech=speech,
                own_prompts=any(value is not None for value in prompts),
            )
        )
    return tuple(sources)


def usable_rows(
    utterances: Utterances,
    lengths: Int[np.ndarray, "n"],
    options: TargetOptions,
    tokens: WhisperTokens,
    packed: bool = False,
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    """The rows that can be learnt, with speech and without; the others are counted in the log.

    lengths: tokens of each row's target; 0 where it is empty, -1 where there is none.
    packed: whether rows become parts of windows, which need complete labels.

    Raises:
        InputError: no row can be learnt; the message gives the reasons.
    """
    longest = max(options.buckets) - longest_prompt(tokens)
    reason_of = cache(lambda language: language_reason(language, tokens) or "")
    default, target = utterances.config.language or options.language, options.target
    flags = utterances.column("speech") if utterances.config.speech else [False] * len(lengths)
    speech = np.array([cell_bool(flag) for flag in flags], bool)
    speech &= (lengths != 0) | (target != "text")
    cut = np.array([packed and not cell_bool(value) for value in utterances.column("ended")], bool)
    languages = utterances.column(utterances.columns.language)
    why: dict[str, Any] = {
        f"no {target} to learn": speech & (lengths < 0),
        f"over {longest} tokens, which is all that a label bucket holds": lengths > longest,
        "a label that was cut, which cannot be packed with others": speech & cut,
    }
    reasons = np.array([reason_of(language or default) for language in languages], object)
    reasons[~speech & (options.non_speech != "end")] = ""
    for reason, rows in reversed(why.items()):  # the first one counts
        reasons[rows & speech] = reason
    usable = reasons == ""
    if not usable.all():
        source, count = utterances.config.source, len(utterances)
        left_out = {reason: np.flatnonzero(reasons == reason) for reason in reasons[~usable]}
        listed = "; ".join(
            f"{reason} ({len(rows)}, first {utterances[rows[0]].id})"
            for reason, rows in left_out.items()
        )
        if not usable.any():
            raise InputError(f"none of the {count} rows of {source} can be learnt: {listed}")
        log.warning("%s: %d of %d rows are left out: %s", source, (~usable).sum(), count, listed)
    return np.flatnonzero(usable & speech), np.flatnonzero(usable & ~speech)


def concatenate_sources(parts: Sequence[TrainingSource]) -> TrainingSource:
    """Datasets as one source: every utterance once per pass."""
    return replace(
        parts[0],
        utterances=Concatenated([part.utterances for part in parts]),  # type: ignore[misc]
        lengths=np.concatenate([part.lengths for part in parts]),
        follows=np.concatenate([part.follows for part in parts]),
        own_prompts=any(part.own_prompts for part in parts),
    )


def with_weights(
    sources: Sequence[TrainingSource], non_speech_share: float | None
) -> tuple[TrainingSource, ...]:
    """The sources with weights: those given, else their hours of audio.

    non_speech_share: share of examples without speech; None leaves it to the weights.

    Raises:
        InputError: a stream has no weight, or no dataset has clips for the share.
    """
    kinds = {source.speech for source in sources}
    if non_speech_share is not None and not 0 <= non_speech_share < 1:
        raise InputError(f"non_speech_share {non_speech_share:g} must be at least 0 and below 1")
    if non_speech_share and kinds != {True, False}:
        missing = "clips without speech" if kinds == {True} else "speech"
        raise InputError(
            f"non_speech_share is {non_speech_share:g} and no dataset has {missing}: add one "
            "(speech = false), or leave the share out"
        )
    if non_speech_share == 0:
        sources = [source for source in sources if source.speech]
    if len(sources) == 1:
        return (replace(sources[0], weight=sources[0].weight or 1.0),)
    weights = np.array([one.weight or audio_hours(one.utterances) for one in sources])
    if non_speech_share:
        speech = np.array([one.speech for one in sources])
        ratio = weights[speech].sum() / weights[~speech].sum()
        weights[~speech] *= ratio * non_speech_share / (1 - non_speech_share)
    return tuple(replace(one, weight=w) for one, w in zip(sources, weights.tolist(), strict=True))


def label_lengths(
    utterances: Utterances, tokens: WhisperTokens, target: Literal["label", "text"]
) -> Int[np.ndarray, "n"]:
    """Tokens of each target, read without the audio; 0 if it is empty, -1 if there is none."""
    columns = utterances.columns
    if target == "label" and columns.labelled:
        return utterances.label_lengths()

    def length_of(text: str | None) -> int:
        if text is None:
            return -1
        one = Utterance("", b"", text=str(text), transcript=str(text))
        # + 1: without a leading space, as in some languages, a text may have one token more
        return len(label_ids(one, tokens, target)) + 1 if strip_special(str(text)) else 0

    texts = utterances.column(columns.text if target == "text" else columns.transcript)
    return np.array([length_of(text) for text in texts], np.int32)


def audio_hours(utterances: Any) -> float:
    """Hours of audio: the dataset's durations, else an estimate from some headers."""
    if isinstance(utterances, UtteranceStream):
        name = utterances.config.source
        raise InputError(f"the hours of the stream {name} are not known: give its weight")
    if isinstance(utterances, Concatenated):
        return sum(map(audio_hours, utterances.parts))
    if isinstance(utterances, Packed):
        return audio_hours(utterances.utterances)
    known = [seconds for seconds in utterances.column("duration") if seconds is not None]
    if len(known) < len(utterances):
        step = max(len(utterances) // CLIPS_FOR_HOURS, 1)
        known = [clip_seconds(utterances[row]) for row in range(0, len(utterances), step)]
    mean = sum(map(float, known)) / max(len(known), 1)
    if mean == 0:
        raise InputError(f"the hours of {utterances.config.source} are not known: give its weight")
    return mean * len(utterances) / 3600


# --- order --------------------------------------------------------------------------------------


def draw_sources(weights: Sequence[float], seed: int, position: int) -> Iterator[tuple[int, int]]:
    """From the `position`-th example of a run on: its source, and that source's earlier draws."""
    edges = np.cumsum(weights) / np.sum(weights)
    edges[-1] = 1.0  # exactly, despite rounding
    before = np.zeros(len(weights), np.int64)
    for block in count():
        random = generator(Purpose.SOURCE, seed, block).random(DRAWS_PER_BLOCK)
        chosen = np.searchsorted(edges, random, side="right")
        if (block + 1) * DRAWS_PER_BLOCK <= position:
            before += np.bincount(chosen, minlength=len(weights))
            continue
        for number, source in enumerate(chosen.tolist(), block * DRAWS_PER_BLOCK):
            if number >= position:
                yield source, int(before[source])
            before[source] += 1


def example_keys(
    sources: Sequence[TrainingSource], seed: int, position: int, lanes: int = 1
) -> Iterator[ExampleKey]:
    """The keys of examples from the `position`-th of a run on.

    A pass over a dataset contains every utterance once. The key of a stream's example has its lane,
    p mod `lanes`; the host of the lane knows which utterance is next.
    """
    orders: dict[int, tuple[int, np.ndarray]] = {}
    drawn = draw_sources([source.weight or 1.0 for source in sources], seed, position)
    for example, (source, before) in enumerate(drawn, position):
        size = sources[source].size
        if size is None:
            yield ExampleKey(source, example % lanes, 0, STREAMED)
            continue
        passes, at = divmod(before, size)
        if source not in orders or orders[source][0] != passes:
            orders[source] = passes, pass_order(size, seed, source, passes)
        yield ExampleKey(source, 0, passes, int(orders[source][1][at]))


def pass_order(size: int, seed: int, source: int, passes: int) -> Int[np.ndarray, "n"]:
    """The order of a pass over a dataset, determined by seed, source and pass."""
    return generator(Purpose.PASS, seed, source, passes).permutation(size)


def rows_by_lane(batch_size: int, lanes: int) -> Int[np.ndarray, "B"]:
    """The example of a batch in each row: the p-th belongs to lane p mod `lanes`, and the rows of a
    lane are adjacent, so that each host has whole lanes."""
    return np.arange(batch_size).reshape(-1, lanes).T.reshape(-1)
