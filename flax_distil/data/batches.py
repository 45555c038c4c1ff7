"""Pseudo-labels → decoder inputs, targets and weights.

The decoder reads `prompt + label`. Every token after the start of transcript is a target of KL
divergence and cross-entropy, as in both published training scripts:

    tokens    previous  text  sot  en          transcribe    notimestamps  Hello  world
    targets   text      sot   en   transcribe  notimestamps  Hello         world  eot
    weights   0         0     1    1           1             1             1      1

Only the position of sot has the teacher's probabilities of languages and no-speech, on which
language detection and the skipping of silence depend. With some probability the text of the
previous utterance precedes sot; it is not a target. Teacher and student read the same `tokens`. A
label that was cut at the maximum length has no eot. For clips without speech see
`non_speech_example`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Float16, Int, Int16, Shaped, UInt32

from flax_distil.data.rng import Purpose, generator
from flax_distil.data.utterances import Utterance
from flax_distil.data.windows import clip_seconds, part_offsets
from flax_distil.errors import InputError
from flax_distil.text.languages import WITHOUT_SPACES, to_language_code
from flax_distil.text.tokens import WhisperTokens, split_timestamps, strip_special

NonSpeech = Literal["teacher", "no_speech", "end"]

PREVIOUS_TOKENS = 223  # of previous text, as in Whisper: less than half of its context of 448


@dataclass(frozen=True)
class TargetOptions:
    """How labels become decoder inputs and targets."""

    buckets: tuple[int, ...] = (32, 64, 128, 256, 448)
    """Lengths L that programs are compiled for; a batch is padded to the smallest that fits."""
    timestamp_probability: float = 0.5
    """Probability that a label with timestamps keeps them (paper table 15)."""
    language: str | None = None
    """Language of utterances without one."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """The task token of the prompt."""
    teacher_states: bool = False
    """Whether batches carry the teacher's final states, which the labels hold."""
    prompt_probability: float = 0.0
    """Probability that the label of the previous utterance precedes the prompt."""
    target: Literal["label", "text"] = "label"
    """The target: the pseudo-label or the reference."""
    non_speech: NonSpeech = "teacher"
    """The target of clips without speech."""
    kl: float = 1.0
    """Factor of the KL divergence and the hidden states' MSE of these examples."""
    ce: float = 1.0
    """Factor of their cross-entropy."""

    def __post_init__(self):
        if self.language is not None:
            object.__setattr__(self, "language", to_language_code(self.language))


if TYPE_CHECKING:
    Leaf = np.ndarray
else:  # a batch is on the host, on devices, traced, or shapes alone
    Leaf = Any  # with a shape and a dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One training batch; B and L are static, everything is an array.

    A: micro-batches, where a step has cut the batch into some.
    """

    waveforms: Int16[Leaf, "*A B N"]
    tokens: Int[Leaf, "*A B L"]
    """Decoder inputs: prompt and label, padded with eot."""
    targets: Int[Leaf, "*A B L"]
    """The next token of each position."""
    weights: Float[Leaf, "*A B L"]
    """1 from the start of transcript to the padding, else 0."""
    seconds: Float[Leaf, "*A B"]
    """Length of the clip before padding."""
    rows: Int[Leaf, "*A B"]
    """Row numbers of the utterances in their dataset."""
    audio: Shaped[Leaf, "*A B S D"] | None = None
    """The encoder's output where it is kept on disk; waveforms are then empty (N = 0)."""
    teacher_states: Float16[Leaf, "*A B L D"] | None = None
    """The teacher's final states at the targets, where labels hold them."""
    keys: UInt32[Leaf, "*A B 2"] | None = None
    """Key data of each example for SpecAugment, if it is on."""
    loss_weights: Float[Leaf, "*A B L 2"] | None = None
    """Factors of KL and cross-entropy at each target; None stands for 1."""
    positions: Int[Leaf, "*A B"] | None = None
    """Audio positions that the student is given of each clip; None stands for all."""


@dataclass(frozen=True)
class Example:
    """One row of a batch before padding; targets before `start` have weight 0.

    kl, ce: factors of the two losses: one for all targets, or one for each from `start` on.
    """

    tokens: list[int]
    targets: list[int]
    start: int
    teacher_states: Float16[np.ndarray, "n D"] | None = None
    kl: float | tuple[float, ...] = 1.0
    ce: float | tuple[float, ...] = 1.0


def make_example(
    utterance: Utterance,
    tokens: WhisperTokens,
    options: TargetOptions,
    seed: Sequence[int] = (),
    previous: Utterance | None = None,
) -> Example:
    """Decoder inputs and targets of one labelled utterance.

    seed: of the run and the example; decides whether timestamps are kept and `previous` is read.
    previous: the utterance before, of whose label the end is read, as much as Whisper reads and the
        longest bucket holds.

    Raises:
        InputError: the utterance has no label, or the checkpoint lacks its language.
    """
    timestamp_draw, prompt_draw = example_draws(seed)
    language = utterance.language or options.language
    timestamps = timestamp_draw < options.timestamp_probability
    if not has_speech(utterance, options.target):
        return non_speech_example(utterance, tokens, options, language, timestamps)
    text_language = "en" if options.task == "translate" else language
    label = label_ids(utterance, tokens, options.target, text_language)
    timestamps &= any(token in tokens.times for token in label)
    is_kept = lambda token: timestamps or token not in tokens.times
    label, before = list(filter(is_kept, label)), None
    prompt = tokens.prompt(language, options.task, timestamps)
    room = min(PREVIOUS_TOKENS, max(options.buckets) - len(prompt) - len(label) - 1)
    if prompt_draw < options.prompt_probability and room > 0:
        before = utterance.previous  # what the label was conditioned on, else the previous label
        if isinstance(before, str):
            before = encode_transcript(before, tokens, " ")
        elif before is None and previous is not None:
            before = label_ids(previous, tokens, options.target, text_language)
    is_control = lambda token: tokens.eot <= token < tokens.timestamp_begin
    before = [token for token in before or () if is_kept(token) and not is_control(token)]
    text = [*tokens.prompt(language, options.task, timestamps, before[-room:]), *label]
    start = text.index(tokens.sot)
    sequence = [*text, tokens.eot] if utterance.ended else text
    states = utterance.teacher_states if options.teacher_states else None
    known, expected = 0 if states is None else len(states), len(prompt) + len(label)
    if options.teacher_states and known != expected:
        raise InputError(
            f"{utterance.id} has its teacher's states at {known} tokens and its label with the "
            f"prompt has {expected}: label it again with --teacher-states, and train without "
            "stored_teacher where labels change"
        )
    if states is not None:
        states = states[: len(sequence) - 1 - start]
    return Example(sequence[:-1], sequence[1:], start, states, options.kl, options.ce)


def has_speech(utterance: Utterance, target: Literal["label", "text"]) -> bool:
    """Whether there is speech to learn; with an empty reference there is none."""
    if utterance.parts:
        return any(has_speech(part, target) for part in utterance.parts)
    empty = target == "text" and utterance.text is not None and not strip_special(utterance.text)
    return utterance.speech and not empty


def language_reason(language: str | None, tokens: WhisperTokens) -> str | None:
    """Why a checkpoint cannot learn a language; None where it can."""
    if language is None and tokens.multilingual:
        return "no language is named"
    return tokens.unsupported(language)


def not_learnable(
    utterance: Utterance, options: TargetOptions, tokens: WhisperTokens
) -> str | None:
    """Why an utterance has nothing to learn for this checkpoint; None where it has."""
    speech = has_speech(utterance, options.target)
    if speech and not has_target(utterance, options.target):
        return f"no {options.target} to learn"
    if speech or options.non_speech == "end":
        return language_reason(utterance.language or options.language, tokens)
    return None


def has_target(utterance: Utterance, target: Literal["label", "text"]) -> bool:
    """Whether there is a label or text; of a window, for all its parts with speech."""
    parts = [one for one in utterance.parts or (utterance,) if has_speech(one, target)]
    if target == "text":
        return all(part.text is not None for part in parts)
    return all((part.token_ids, part.transcript) != (None, None) for part in parts)


def non_speech_example(
    utterance: Utterance,
    tokens: WhisperTokens,
    options: TargetOptions,
    language: str | None,
    timestamps: bool,
) -> Example:
    """Inputs and targets of silence, noise and music, whatever their label says.

    The KL at the start of transcript, where the teacher gives the probability of no speech, and a
    cross-entropy by `options.non_speech`: none, on the no-speech token at that position, or on an
    eot that follows the prompt (and `<|0.00|>` if timestamps are on).
    """
    states = utterance.teacher_states if options.teacher_states else None
    states = None if states is None else states[:1]
    if options.non_speech != "end":
        ce = options.ce * (options.non_speech == "no_speech")
        return Example([tokens.sot], [tokens.no_speech], 0, states, options.kl, ce)
    prompt = tokens.prompt(language, options.task, timestamps)
    sequence = [*prompt, *[tokens.timestamp_begin] * timestamps, tokens.eot]
    length, prompted = len(sequence) - 1, len(prompt) - 1
    kl = (options.kl, *[0.0] * (length - 1))
    ce = (*[0.0] * prompted, *[options.ce] * (length - prompted))
    return Example(sequence[:-1], sequence[1:], 0, states, kl, ce)


def label_ids(
    utterance: Utterance,
    tokens: WhisperTokens,
    target: Literal["label", "text"] = "label",
    language: str | None = None,
) -> list[int]:
    """The token ids of the pseudo-label or the reference; those of a window have its parts' times.

    A pseudo-label that is text is encoded, with timestamps written in it (`<|1.08|>`) as timestamp
    tokens. Other special tokens written in texts are left out. In a window the label of a part
    without timestamps is put between the times of its clip.

    Raises:
        InputError: the utterance has no label or reference.
    """
    if utterance.parts:
        ids = []
        for start, part in zip(part_offsets(utterance), utterance.parts, strict=True):
            if has_speech(part, target):
                label = label_ids(part, tokens, target, language)
                times = [tokens.seconds(token) for token in label]
                if not any(time is not None for time in times):
                    label = [tokens.timestamp_begin, *label, tokens.timestamp_begin]
                    times = [0.0, *times, clip_seconds(part)]
                ids += [
                    token if time is None else tokens.timestamp(start + time)
                    for token, time in zip(label, times, strict=True)
                ]
        return ids
    space = "" if language in WITHOUT_SPACES else " "
    if target == "text":
        if utterance.text is None:
            raise InputError(f"{utterance.id} has no text to learn: name its text_column")
        return tokens.encode(space + strip_special(utterance.text))
    if utterance.token_ids is not None:
        return list(utterance.token_ids)
    if utterance.transcript is not None:
        return encode_transcript(utterance.transcript, tokens, space)
    raise InputError(
        f"{utterance.id} has no token_ids: label its dataset with pseudo-label, or learn its "
        'reference (target = "text")'
    )


def encode_transcript(transcript: str, tokens: WhisperTokens, space: str) -> list[int]:
    """Token ids of a label given as text; each piece of text begins with `space`."""
    ids: list[int] = []
    for piece in split_timestamps(transcript):
        if isinstance(piece, str):
            ids += tokens.encode(space + piece.strip())
        else:
            ids.append(tokens.timestamp(piece))
    return ids


def example_draws(seed: Sequence[int]) -> tuple[float, float]:
    """Two numbers in [0, 1) that the seed determines, for timestamps and for the prompt."""
    timestamps, prompt = generator(Purpose.EXAMPLE, *seed).random(2)
    return float(timestamps), float(prompt)


def longest_prompt(tokens: WhisperTokens) -> int:
    """Tokens of the longest prompt without previous text: 4, or 2 of an English-only checkpoint."""
    return 4 if tokens.multilingual else 2


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket for `length` decoder inputs. Raises InputError where none is enough."""
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
    weighted: bool = False,
    positions: Sequence[int] | None = None,
) -> Batch:
    """Rows padded to `length` tokens; a row of 0 seconds could not be decoded and has weight 0.

    weighted: whether the batch has `loss_weights`, as all batches of a run or none.
    """
    shape = (len(examples), length)
    tokens, weights = np.full(shape, eot, np.int32), np.zeros(shape, np.float32)
    targets, factors = tokens.copy(), np.zeros((*shape, 2), np.float32)
    widths = [row.teacher_states.shape[-1] for row in examples if row.teacher_states is not None]
    states = np.zeros((*shape, widths[0]), np.float16) if widths else None
    for number, row in enumerate(examples):
        end = len(row.tokens)
        tokens[number, :end] = row.tokens
        targets[number, :end] = row.targets
        factors[number, row.start : end] = np.stack(np.broadcast_arrays(row.kl, row.ce), axis=-1)
        weights[number, row.start : end] = seconds[number] > 0
        if states is not None and row.teacher_states is not None:
            states[number, row.start : row.start + len(row.teacher_states)] = row.teacher_states
    if weighted:
        weights *= factors.any(axis=-1)
    return Batch(
        waveforms=waveforms,
        tokens=tokens,
        targets=targets,
        weights=weights,
        seconds=np.asarray(seconds, np.float32),
        rows=np.asarray(rows, np.int32),
        audio=audio,
        teacher_states=states,
        keys=keys,
        loss_weights=factors if weighted else None,
        positions=None if positions is None else np.asarray(positions, np.int32),
    )
