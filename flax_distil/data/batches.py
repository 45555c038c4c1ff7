"""Pseudo-labels → what the decoder reads and what it must say next.

The decoder reads `prompt + label` and must say `label + eot`. The prompt (start of transcript,
language, task, no-timestamps) is given and never learnt, so its positions weigh 0, as in the
published PyTorch code (the published Flax code trains on the prompt's tokens):

    tokens   sot  en  transcribe  notimestamps   Hello   world
    targets   en  …   …           Hello          world   eot
    weights    0   0   0          1              1       1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int, Int16, Shaped

from flax_distil.data.stored_teacher import StoredTeacher, collate_stored
from flax_distil.data.utterances import Utterance, to_language
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens


@dataclass(frozen=True)
class TargetOptions:
    """How labels become decoder inputs and targets."""

    buckets: tuple[int, ...] = (32, 64, 128, 256, 448)
    """Label lengths L that programs are compiled for; a batch takes the first that holds it."""
    timestamp_probability: float = 0.5
    """How often a label that has timestamps keeps them (paper table 15)."""
    language: str | None = None
    """Language of utterances that name none."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """The task token of the prompt."""
    stored: bool = False
    """Whether batches carry the teacher's distributions, which the labels hold."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One training batch; B and L are static, everything is an array."""

    waveforms: Int16[np.ndarray, "B N"]
    tokens: Int[np.ndarray, "B L"]
    """Decoder inputs: prompt and label, filled up with eot."""
    targets: Int[np.ndarray, "B L"]
    """The next token of each position."""
    weights: Float[np.ndarray, "B L"]
    """1 where the target is learnt: label and eot. 0 on prompt and padding."""
    seconds: Float[np.ndarray, "B"]
    """Length of the clip before padding."""
    rows: Int[np.ndarray, "B"]
    """Numbers of the utterances in their dataset."""
    audio: Shaped[np.ndarray, "B S D"] | None = None
    """The encoder's output where it is kept on disk; there are no waveforms then (N = 0)."""
    stored: StoredTeacher | None = None
    """The teacher's distributions at the targets, where the labels hold them and they are used."""


@dataclass(frozen=True)
class Example:
    """One row of a batch before padding: `targets[i]` is learnt from `start` on."""

    tokens: list[int]
    targets: list[int]
    start: int
    stored: StoredTeacher | None = None


def example(
    utterance: Utterance,
    tokens: WhisperTokens,
    options: TargetOptions,
    seed: Sequence[int] = (),
) -> Example:
    """The decoder's side of one labelled utterance.

    `seed` (run's seed, epoch, utterance) alone decides whether timestamps stay.
    Raises InputError for an utterance without a label or a language the checkpoint lacks.
    """
    if utterance.token_ids is None:
        raise InputError(f"{utterance.id} has no token_ids: label its dataset with pseudo-label")
    label = list(utterance.token_ids)
    timestamps = False
    if any(token >= tokens.timestamp_begin for token in label):
        timestamps = keeps_timestamps(options.timestamp_probability, seed)
        if not timestamps:
            label = [token for token in label if token < tokens.timestamp_begin]
    language = utterance.language or options.language
    code = None if language is None else to_language(language)
    prompt = tokens.prompt(code, options.task, timestamps=timestamps)
    line = [*prompt, *label, tokens.eot]
    stored = distributions(utterance, len(label) + 1) if options.stored else None
    return Example(line[:-1], line[1:], len(prompt) - 1, stored)


def distributions(utterance: Utterance, count: int) -> StoredTeacher:
    """The teacher at each of `count` targets. Raises InputError where the label holds others."""
    there = 0 if utterance.stored is None else len(utterance.stored.tails)
    if utterance.stored is None or there != count:
        raise InputError(
            f"{utterance.id} holds distributions of {there} tokens and its label is learnt as "
            f"{count}: label it with --top-k, and train without stored_teacher where labels change"
        )
    return utterance.stored


def keeps_timestamps(probability: float, seed: Sequence[int]) -> bool:
    """A coin that falls the same way for the same seed, whoever throws it."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed))))
    return bool(generator.random() < probability)


def longest_prompt(tokens: WhisperTokens) -> int:
    """Tokens of the longest prompt without previous text: 4, or 2 where English-only."""
    return 4 if tokens.multilingual else 2


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The first bucket that holds `length` decoder inputs. Raises InputError when none does."""
    for bucket in sorted(buckets):
        if length <= bucket:
            return bucket
    raise InputError(
        f"a label with its prompt has {length} tokens, the longest bucket {max(buckets)}: filter "
        "with a smaller max_label_tokens, or add a bucket of at most 448"
    )


def collate(
    examples: Sequence[Example],
    waveforms: Int16[np.ndarray, "B N"],
    seconds: Sequence[float],
    rows: Sequence[int],
    length: int,
    eot: int,
    audio: Shaped[np.ndarray, "B S D"] | None = None,
) -> Batch:
    """Rows padded to `length` tokens; a row of 0 seconds was not heard and weighs nothing."""
    tokens = np.full((len(examples), length), eot, np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    for number, row in enumerate(examples):
        end = len(row.tokens)
        tokens[number, :end] = row.tokens
        targets[number, :end] = row.targets
        weights[number, row.start : end] = seconds[number] > 0
    return Batch(
        waveforms=waveforms,
        tokens=tokens,
        targets=targets,
        weights=weights,
        seconds=np.asarray(seconds, np.float32),
        rows=np.asarray(rows, np.int32),
        audio=audio,
        stored=collate_stored([(row.start, row.stored) for row in examples], length),
    )
