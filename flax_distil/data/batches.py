"""Pseudo-labels → what the decoder reads and what it must say next.

The decoder reads `prompt + label` and must say `label + eot`. The prompt (start of transcript,
language, task, no-timestamps) is given and never learnt, so its positions weigh 0, as in the
published PyTorch code (the published Flax code trains on the prompt's tokens):

    tokens   sot  en  transcribe  notimestamps   Hello   world
    targets   en  …   …           Hello          world   eot
    weights    0   0   0          1              1       1

With probability p_prev the text before (`<|startofprev|>` and the label of the utterance before) is
part of the prompt. Teacher and student read the same `tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Int, Int16, Shaped, UInt32

from flax_distil.data.chance import Purpose, generator
from flax_distil.data.packing import beginnings, length
from flax_distil.data.stored_teacher import StoredTeacher, collate_stored, places
from flax_distil.data.utterances import Utterance, to_language
from flax_distil.errors import InputError
from flax_distil.text.languages import WITHOUT_SPACES
from flax_distil.text.tokens import WhisperTokens

PREVIOUS_TOKENS = 223  # of text before: less than half of Whisper's context of 448


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
    prompt_probability: float = 0.0
    """How often the label of the utterance before is read first."""
    target: Literal["label", "text"] = "label"
    """What is learnt: the pseudo-label or the reference."""


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
    keys: UInt32[np.ndarray, "B 2"] | None = None
    """Key data of each example for SpecAugment, where it is on."""


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
    previous: Utterance | None = None,
) -> Example:
    """The decoder's side of one labelled utterance; `previous` is the one before, if any.

    `seed` (of the run and the example) alone decides whether timestamps stay and whether `previous`
    is read. Of its label the end is taken, as much as Whisper reads and the longest bucket holds.
    Raises InputError for an utterance without a label or a language the checkpoint lacks.
    """
    timed, prompted = coins(seed)
    language = utterance.language or options.language
    code = None if language is None else to_language(language)
    spelt = "en" if options.task == "translate" else code
    label = label_ids(utterance, tokens, options.target, spelt)
    timestamps = timed < options.timestamp_probability
    timestamps &= any(token >= tokens.timestamp_begin for token in label)

    def written(ids: list[int]) -> list[int]:
        return ids if timestamps else [token for token in ids if token < tokens.timestamp_begin]

    label = written(label)
    prompt = tokens.prompt(code, options.task, timestamps=timestamps)
    room = min(PREVIOUS_TOKENS, max(options.buckets) - len(prompt) - len(label) - 1)
    if previous and prompted < options.prompt_probability and room > 0:
        before = written(label_ids(previous, tokens, options.target, spelt))[-room:]
        prompt = tokens.prompt(code, options.task, timestamps, before)
    line = [*prompt, *label, tokens.eot]
    stored = distributions(utterance, len(label) + 1) if options.stored else None
    return Example(line[:-1], line[1:], len(prompt) - 1, stored)


def distributions(utterance: Utterance, count: int) -> StoredTeacher:
    """The teacher at each of `count` targets. Raises InputError where the label holds others."""
    there = 0 if utterance.stored is None else places(utterance.stored)
    if utterance.stored is None or there != count:
        raise InputError(
            f"{utterance.id} holds its teacher at {there} tokens and its label is learnt as "
            f"{count}: label it with --teacher-states, and train without stored_teacher where "
            "labels change"
        )
    return utterance.stored


def label_ids(
    utterance: Utterance,
    tokens: WhisperTokens,
    target: Literal["label", "text"] = "label",
    language: str | None = None,
) -> list[int]:
    """What is said: the pseudo-label or the reference; a window's with the times of its parts."""
    if utterance.parts:
        starts = beginnings(utterance)
        return [
            token
            for start, part in zip(starts, utterance.parts, strict=True)
            for token in timed_ids(part, label_ids(part, tokens, target, language), start, tokens)
        ]
    if target == "text":
        if utterance.text is None:
            raise InputError(f"{utterance.id} has no text to learn: name its text_column")
        space = "" if language in WITHOUT_SPACES else " "
        return tokens.encode(space + utterance.text.strip())
    if utterance.token_ids is None:
        raise InputError(
            f"{utterance.id} has no token_ids: label its dataset with pseudo-label, or learn its "
            'reference (target = "text")'
        )
    return list(utterance.token_ids)


def timed_ids(part: Utterance, label: list[int], start: float, tokens: WhisperTokens) -> list[int]:
    """The label of a part that begins `start` seconds into its window.

    Timestamps are moved; a label without any stands between the times of its clip.
    """
    times = [tokens.seconds(token) for token in label]
    if not any(time is not None for time in times):
        return [tokens.timestamp(start), *label, tokens.timestamp(start + length(part))]
    return [
        token if time is None else tokens.timestamp(start + time)
        for token, time in zip(label, times, strict=True)
    ]


def coins(seed: Sequence[int]) -> tuple[float, float]:
    """Two numbers in [0, 1), the same for the same seed, whoever asks: timestamps, prompt."""
    timed, prompted = generator(Purpose.EXAMPLE, *seed).random(2)
    return float(timed), float(prompted)


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
    keys: UInt32[np.ndarray, "B 2"] | None = None,
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
        keys=keys,
    )
