"""Pseudo-labels → decoder inputs, targets and weights.

The decoder reads `prompt + label`; every next token after the start of transcript is a target of
KL and cross-entropy, as in both published training scripts:

    tokens    previous  text  sot  en          transcribe    notimestamps  Hello  world
    targets   text      sot   en   transcribe  notimestamps  Hello         world  eot
    weights   0         0     1    1           1             1             1      1

The position that reads sot has the teacher's probabilities of language and no-speech, on which
language detection and the skipping of silence depend: only there can a student learn them. With
probability p_prev the text of the utterance before is read first and is not learnt. Teacher and
student read the same `tokens`. A label that was cut at its longest length has no eot to learn.
Clips without speech have targets of their own, see `non_speech_example`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float, Float16, Int, Int16, Shaped, UInt32

from flax_distil.data.packing import clip_seconds, part_offsets
from flax_distil.data.rng import Purpose, generator
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError
from flax_distil.text.languages import WITHOUT_SPACES, to_language_code
from flax_distil.text.special import split_timestamps, strip_special
from flax_distil.text.tokens import WhisperTokens

NonSpeech = Literal["teacher", "no_speech", "end"]

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
    non_speech: NonSpeech = "teacher"
    """What is learnt of clips without speech."""
    kl: float = 1.0
    """Factor of the KL divergence (and the hidden states' distance) of these examples."""
    ce: float = 1.0
    """Factor of their cross-entropy."""

    def __post_init__(self):
        if self.language is not None:
            object.__setattr__(self, "language", to_language_code(self.language))


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
    """1 where the target is learnt: from the start of transcript on, up to the padding."""
    seconds: Float[np.ndarray, "B"]
    """Length of the clip before padding."""
    rows: Int[np.ndarray, "B"]
    """Numbers of the utterances in their dataset."""
    audio: Shaped[np.ndarray, "B S D"] | None = None
    """The encoder's output where it is kept on disk; there are no waveforms then (N = 0)."""
    teacher_states: Float16[np.ndarray, "B L D"] | None = None
    """The teacher's final states at the targets, where the labels hold them and they are used."""
    keys: UInt32[np.ndarray, "B 2"] | None = None
    """Key data of each example for SpecAugment, where it is on."""
    loss_weights: Float[np.ndarray, "B L 2"] | None = None
    """Factors of KL and cross-entropy at each target; 1 and 1 where None."""


@dataclass(frozen=True)
class Example:
    """One row of a batch before padding: `targets[i]` is learnt from `start` on.

    kl, ce: factors of the two losses, one for all targets, or one for each from `start` on.
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
    """The decoder's side of one labelled utterance; `previous` is the one before, if any.

    `seed` (of the run and the example) alone decides whether timestamps stay and whether `previous`
    is read. Of its label the end is taken, as much as Whisper reads and the longest bucket holds.
    Raises InputError for an utterance without a label or a language the checkpoint lacks.
    """
    timed, prompted = example_draws(seed)
    language = utterance.language or options.language
    timestamps = timed < options.timestamp_probability
    if not has_speech(utterance, options.target):
        return non_speech_example(utterance, tokens, options, language, timestamps)
    spelt = "en" if options.task == "translate" else language
    label = label_ids(utterance, tokens, options.target, spelt)
    timestamps &= any(token in tokens.times for token in label)

    def written(ids: list[int]) -> list[int]:
        return ids if timestamps else [token for token in ids if token not in tokens.times]

    label = written(label)
    prompt = tokens.prompt(language, options.task, timestamps=timestamps)
    end = [tokens.eot] if utterance.ended else []
    line, start = [*prompt, *label, *end], 0
    room = min(PREVIOUS_TOKENS, max(options.buckets) - len(prompt) - len(label) - 1)
    before = []
    if prompted < options.prompt_probability and room > 0:
        before = written(previous_ids(utterance, previous, tokens, options.target, spelt))[-room:]
    if before:
        line = [*tokens.prompt(language, options.task, timestamps, before), *label, *end]
        start = line.index(tokens.sot)
    stored = None
    if options.stored:
        stored = distributions(utterance, len(prompt) + len(label), len(line) - 1 - start)
    return Example(line[:-1], line[1:], start, stored, options.kl, options.ce)


def previous_ids(
    utterance: Utterance,
    previous: Utterance | None,
    tokens: WhisperTokens,
    target: Literal["label", "text"],
    language: str | None,
) -> list[int]:
    """The label of the utterance before: as the dataset keeps it beside this one, else its own."""
    kept = utterance.previous
    if kept is None:
        return label_ids(previous, tokens, target, language) if previous else []
    ids = encode_transcript(kept, tokens, " ") if isinstance(kept, str) else kept
    return [token for token in ids if token < tokens.eot or token >= tokens.timestamp_begin]


def has_speech(utterance: Utterance, target: Literal["label", "text"]) -> bool:
    """Whether there is speech to learn: an empty reference says that there is none."""
    if utterance.parts:
        return any(has_speech(part, target) for part in utterance.parts)
    empty = target == "text" and utterance.text is not None and not strip_special(utterance.text)
    return utterance.speech and not empty


def non_speech_example(
    utterance: Utterance,
    tokens: WhisperTokens,
    options: TargetOptions,
    language: str | None,
    timestamps: bool,
) -> Example:
    """What is learnt of silence, noise and music, whatever the teacher wrote about it.

    The KL at the start of transcript, where the teacher says how probable it is that nobody speaks,
    and by `options.non_speech` a cross-entropy: none, on the no-speech token there, or on an end
    that follows the prompt at once (after `<|0.00|>` where timestamps are written).
    """
    states = utterance.teacher_states if options.stored else None
    states = None if states is None else states[:1]
    if options.non_speech != "end":
        ce = options.ce * (options.non_speech == "no_speech")
        return Example([tokens.sot], [tokens.no_speech], 0, states, options.kl, ce)
    prompt = tokens.prompt(language, options.task, timestamps)
    line = [*prompt, *([tokens.timestamp_begin] if timestamps else []), tokens.eot]
    given = len(prompt) - 1
    taught = len(line) - 1 - given
    return Example(
        line[:-1],
        line[1:],
        0,
        states,
        (options.kl, *[0.0] * (len(line) - 2)),
        (*[0.0] * given, *[options.ce] * taught),
    )


def distributions(utterance: Utterance, stored: int, learnt: int) -> Float16[np.ndarray, "n D"]:
    """The teacher at the first `learnt` of the `stored` places that a label with its prompt has.

    Raises InputError where the label holds another number of them.
    """
    states = utterance.teacher_states
    held = 0 if states is None else len(states)
    if states is None or held != stored:
        raise InputError(
            f"{utterance.id} holds its teacher's distributions at {held} tokens and its label with "
            f"the prompt has {stored}: label it again with --teacher-states, and train without "
            "stored_teacher where labels change"
        )
    return states[:learnt]


def _pad_states(
    examples: Sequence[Example], length: int
) -> Float16[np.ndarray, "B {length} D"] | None:
    """The examples' final states, from `start` on; None where no example has any."""
    present = [row.teacher_states for row in examples if row.teacher_states is not None]
    if not present:
        return None
    states_BLD = np.zeros((len(examples), length, present[0].shape[-1]), np.float16)
    for states_LD, row in zip(states_BLD, examples, strict=True):
        if row.teacher_states is not None:
            states_LD[row.start : row.start + len(row.teacher_states)] = row.teacher_states
    return states_BLD


def label_ids(
    utterance: Utterance,
    tokens: WhisperTokens,
    target: Literal["label", "text"] = "label",
    language: str | None = None,
) -> list[int]:
    """The token ids of the pseudo-label or the reference; a window's with the times of its parts.

    A pseudo-label that is given as text alone is encoded, timestamps written in it (`<|1.08|>`)
    as timestamps. Other special tokens written in texts are left out.
    """
    if utterance.parts:
        starts = part_offsets(utterance)
        return [
            token
            for start, part in zip(starts, utterance.parts, strict=True)
            if has_speech(part, target)
            for token in shift_timestamps(
                part, label_ids(part, tokens, target, language), start, tokens
            )
        ]
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
    """Token ids of a label given as text; each stretch of text begins with `space`."""
    ids: list[int] = []
    for piece in split_timestamps(transcript):
        if isinstance(piece, str):
            ids += tokens.encode(space + piece.strip())
        else:
            ids.append(tokens.timestamp(piece))
    return ids


def shift_timestamps(
    part: Utterance, label: list[int], start: float, tokens: WhisperTokens
) -> list[int]:
    """The label of a part that begins `start` seconds into its window.

    Timestamps are moved; a label without any stands between the times of its clip.
    """
    times = [tokens.seconds(token) for token in label]
    if not any(time is not None for time in times):
        return [tokens.timestamp(start), *label, tokens.timestamp(start + clip_seconds(part))]
    return [
        token if time is None else tokens.timestamp(start + time)
        for token, time in zip(label, times, strict=True)
    ]


def example_draws(seed: Sequence[int]) -> tuple[float, float]:
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
    weighted: bool = False,
) -> Batch:
    """Rows padded to `length` tokens; a row of 0 seconds could not be used and weighs nothing.

    weighted: whether the batch has `loss_weights`, which is the same for all batches of a run.
    """
    tokens = np.full((len(examples), length), eot, np.int32)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    factors = np.zeros((*tokens.shape, 2), np.float32) if weighted else None
    for number, row in enumerate(examples):
        end = len(row.tokens)
        tokens[number, :end] = row.tokens
        targets[number, :end] = row.targets
        weights[number, row.start : end] = seconds[number] > 0
        if factors is not None:
            learnt = factors[number, row.start : end]
            learnt[:, 0], learnt[:, 1] = row.kl, row.ce
            weights[number, row.start : end] *= learnt.any(axis=1)
    return Batch(
        waveforms=waveforms,
        tokens=tokens,
        targets=targets,
        weights=weights,
        seconds=np.asarray(seconds, np.float32),
        rows=np.asarray(rows, np.int32),
        audio=audio,
        teacher_states=_pad_states(examples, length),
        keys=keys,
        loss_weights=factors,
    )
