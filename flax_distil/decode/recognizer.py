"""A model ready to recognise: batches of windows in, texts out."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.beam import BeamSearch, beam
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.greedy import Prompt, Sampling, SearchResult, greedy
from flax_distil.decode.language import detect_language
from flax_distil.decode.options import Acceptance, DecodeOptions, Hypothesis
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.speculative import speculative
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES
from flax_distil.model.generation import kept_heads
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip, chips_of, replicate
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens
from flax_distil.text.wer import compression_ratio

log = logging.getLogger(__name__)

PROMPT_LENGTHS = (8, 64, 256)  # prompts are padded to one of these, so that few programs compile
CPU_DRAFT_ROWS = 1  # with more, greedy search is faster than any assistant (docs/LOG.md)
GIBI = 2**30


@dataclass(frozen=True, eq=False)
class Recognizer:
    """All that recognition needs: the program, its numbers (on the device) and its vocabulary.

    alignment_heads: (layer, head) of the cross-attention that follows the speech; none are known
        where it is empty.
    language: code of the only language that it was trained on, where its generation config says so:
        what is spoken where nobody names a language. Without it the language is detected.
    previous_text: whether windows of long recordings are read with the text before them; not where
        the generation config says that the model was trained without (`condition_on_prev_tokens`).
    """

    spec: Spec
    params: Params
    tokens: WhisperTokens
    alignment_heads: tuple[tuple[int, int], ...] = ()
    language: str | None = None
    previous_text: bool = True

    @cached_property
    def head_DV(self) -> Float[Array, "D V"] | None:
        """The embedding transposed, for searches to project on; made once, and on CPUs alone.

        There making it takes as long as several steps (docs/LOG.md). It is V x D more numbers in
        memory.
        """
        if jax.default_backend() != "cpu":
            return None
        embedding_VD = self.params["decoder"]["tokens"]["embedding"]
        return jnp.asarray(embedding_VD, self.spec.dtype).T


@dataclass(frozen=True)
class Window:
    """What is known of one window beside its sound.

    previous: tokens of the text before it. temperature, seed: of what is drawn.
    """

    language: str
    previous: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0


def make_recognizer(checkpoint: Checkpoint, dtype: str = "float32") -> Recognizer:
    """A recogniser over a checkpoint, its parameters in `dtype` on all chips of this process.

    Raises:
        InputError: the tokenizer is missing, damaged or another model's.
    """
    dims, tokens = checkpoint.dims, checkpoint.tokens()
    heads = kept_heads(checkpoint.generation.get("alignment_heads"), dims) or ()
    language = only_language(checkpoint.generation, tokens)
    params = replicate(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.params))
    pairs = tuple((layer, head) for layer, head in heads)
    previous_text = checkpoint.generation.get("condition_on_prev_tokens") is not False
    spec = Spec(dims, dtype).on(jax.local_devices()[0])
    return Recognizer(spec, params, tokens, pairs, language, previous_text)


def only_language(generation: Mapping[str, Any], tokens: WhisperTokens) -> str | None:
    """The code of `language` in a generation config; None where there is none, or all English.

    Raises:
        InputError: there is no such language, or the model lacks it.
    """
    named = generation.get("language")
    if not named or not tokens.multilingual:
        return None
    code = to_language_code(named.strip("<|>"))
    tokens.prompt(code)  # raises where the model lacks it
    return code


def recognize(
    recognizer: Recognizer,
    waveforms_BN: Num[np.ndarray, "B N"],
    options: DecodeOptions,
    assistant: Assistant | None = None,
) -> list[Hypothesis]:
    """One hypothesis a window, by greedy search, beam search or sampling, as `options` ask.

    waveforms_BN: 16 kHz, int16 or float, N = 480,000 samples (30 s, padded with silence). The batch
        is filled up to a power of two, so that a run compiles few programs.
    assistant: drafts what the model verifies: the same text by greedy search, or another draw from
        the same distribution.

    Raises:
        InputError: the windows have another length, the model lacks the language or task, the
            device the memory, or the assistant cannot help this search.
    """
    batch, samples = waveforms_BN.shape
    if samples != CHUNK_SAMPLES:
        raise InputError(f"windows have {samples} samples: pad or trim them to {CHUNK_SAMPLES}")
    if not batch:
        return []
    known, previous = prepare(recognizer, options, batch, assistant)
    filled_BN = pad_batch(waveforms_BN)
    audio_BSD = encode(recognizer.spec, recognizer.params["encoder"], filled_BN)
    languages = [known] * batch if known else detect(recognizer, audio_BSD)[:batch]
    windows = [
        Window(language, previous, options.temperature, options.seed + row)
        for row, language in enumerate(languages)
    ]
    heard_BSE = drafter_hears(assistant, windows, encode, filled_BN)
    return decode(recognizer, audio_BSD, options, windows, assistant, heard_BSE)


def prepare(
    recognizer: Recognizer, options: DecodeOptions, batch: int, assistant: Assistant | None
) -> tuple[str | None, tuple[int, ...]]:
    """The code of the language asked for, if any, and the tokens of the prompt.

    Raises:
        InputError: the model lacks the language or task, the device the memory, hotwords or prefix
            are too long, or the assistant cannot help this search.
    """
    drawn = options.best_of if options.temperature else 1
    if assistant and (options.beams, drawn) != (1, 1):
        raise InputError(
            f"an assistant cannot help {options.beams} beams and the best of {drawn} texts: use "
            "one of each, or no assistant"
        )
    check_memory(recognizer, batch_bucket(batch), options)
    known = checked_language(recognizer, options)
    previous = text_ids(recognizer.tokens, options.prompt)
    if len(previous) > (most := room_before(recognizer, options)):
        log.warning("the prompt has %d tokens: its last %d are used", len(previous), most)
    prompt_ids(recognizer, options, Window(known or "en", previous))  # raises before any work
    return known, previous


def decode(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    options: DecodeOptions,
    windows: Sequence[Window],
    assistant: Assistant | None = None,
    heard_BSE: Float[Array, "B S E"] | None = None,
) -> list[Hypothesis]:
    """One hypothesis for each of `windows`, whose sound the first rows of `audio_BSD` are.

    `prompt`, `language`, `temperature` and `seed` are the windows', not the options'. heard_BSE:
    what the assistant hears, where it has an encoder of its own. It is not asked where it could
    only lose time (`drafting_pays`); hypotheses then have no acceptance.

    Raises:
        InputError: hotwords or prefix are too long, or the model lacks the language or task.
    """
    spec, params, tokens = recognizer.spec, recognizer.params["decoder"], recognizer.tokens
    rows = len(audio_BSD)
    prompts = [prompt_ids(recognizer, options, window) for window in windows]
    prompts += [prompts[0]] * (rows - len(prompts))
    active_B = np.arange(rows) < len(windows)
    prompt = make_prompt(prompts, tokens.sot)
    # Of any prompt the same, for it decides the program: a search ends where the context is full.
    room = min(options.max_tokens, spec.dims.text_positions)
    arguments = (spec, params, audio_BSD, prompt, active_B, rule_set(tokens, options), room)
    drawn, acceptance = sampling(windows, rows), None
    if assistant and drafting_pays(windows, rows):
        draft_audio = audio_BSD if heard_BSE is None else heard_BSE
        found, acceptance = speculative(
            *arguments,
            assistant.drafter,
            draft_audio,
            assistant.draft_tokens,
            drawn,
            recognizer.head_DV,
            assistant.break_even,
        )
    elif options.beams > 1 and drawn is None:
        found = beam(*arguments, beam_search(options), recognizer.head_DV)
    else:
        copies = options.best_of if drawn else 1
        penalty = options.length_penalty
        found = greedy(*arguments, drawn, copies, penalty, recognizer.head_DV)
    prefix = prefix_ids(tokens, options)
    most = [min(room, spec.dims.text_positions + 1 - len(prompt)) for prompt in prompts]
    return read(jax.device_get(found), windows, tokens, most, prefix, jax.device_get(acceptance))


def drafting_pays(windows: Sequence[Window], rows: int) -> bool:
    """Whether an assistant is asked about a batch of `rows`.

    Where more rows keep a CPU busy, verifying some tokens costs as much as writing them. Where
    tokens are drawn it always is: a draw must not depend on how many others there are.
    """
    few = jax.default_backend() != "cpu" or rows <= CPU_DRAFT_ROWS
    return few or any(window.temperature > 0 for window in windows)


def sampling(windows: Sequence[Window], rows: int) -> Sampling | None:
    """Temperatures and seeds of a batch of `rows`; None where nothing is drawn."""
    if not any(window.temperature > 0 for window in windows):
        return None
    fill_up = (0, rows - len(windows))
    temperature_B = np.array([window.temperature for window in windows], np.float32)
    seed_B = np.array([window.seed % 2**31 for window in windows], np.int32)
    filled = (np.pad(column_B, fill_up) for column_B in (temperature_B, seed_B))
    return Sampling(*map(jnp.asarray, filled))


@by_clip(static=("spec",))
def encode(spec: Spec, params: Params, waveforms_BN: Num[Array, "B N"]) -> Float[Array, "B S D"]:
    """Waveforms to audio states; log-mel runs on the device. params: the encoder's.

    CPUs take one clip after the other, which stays in their cache (docs/LOG.md).
    """

    def together(waveforms_BN: Array) -> Array:
        return spec.encoder(params)(log_mel(waveforms_BN, spec.dims.mels))

    def in_turn(waveforms_BN: Array) -> Array:
        return jax.lax.map(lambda waveform_N: together(waveform_N[None])[0], waveforms_BN)

    return jax.lax.platform_dependent(waveforms_BN, cpu=in_turn, default=together)


def drafter_hears(
    assistant: Assistant | None,
    windows: Sequence[Window],
    encoder: Callable[..., Array],
    sound: np.ndarray,
) -> Float[Array, "B S E"] | None:
    """Audio states for an assistant with an encoder of its own, where `decode` will ask it.

    encoder: of (spec, params, sound).
    """
    if assistant is None or assistant.encoder is None or not drafting_pays(windows, len(sound)):
        return None
    return encoder(*assistant.encoder, sound)


def detect(recognizer: Recognizer, audio_BSD: Float[Array, "B S D"]) -> list[str]:
    """The code of each row's likeliest language."""
    if not recognizer.tokens.multilingual:
        return ["en"] * len(audio_BSD)
    spec, params = recognizer.spec, recognizer.params["decoder"]
    probabilities = detect_language(spec, params, audio_BSD, recognizer.tokens)
    return [max(row, key=row.__getitem__) for row in probabilities]


def checked_language(recognizer: Recognizer, options: DecodeOptions) -> str | None:
    """The code of the language asked for, or of the only one that the model has, if any.

    Raises:
        InputError: there is no such language, or the model lacks it or the task.
    """
    asked = to_language_code(options.language) if options.language else recognizer.language
    tokens = recognizer.tokens
    tokens.prompt(asked or ("en" if tokens.multilingual else None), options.task)
    return asked


def batch_bucket(batch: int) -> int:
    """The power of two that a batch is filled up to."""
    return 1 << max(batch - 1, 0).bit_length()


def pad_batch(array: np.ndarray) -> np.ndarray:
    """Rows of zeros up to the next power of two."""
    missing = batch_bucket(len(array)) - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def text_ids(tokens: WhisperTokens, text: str | None) -> tuple[int, ...]:
    """Ids of a text that goes before, as Whisper writes one: after a space."""
    return tuple(tokens.encode(" " + text.strip())) if text and text.strip() else ()


def prompt_ids(recognizer: Recognizer, options: DecodeOptions, window: Window) -> list[int]:
    """What the decoder reads: hotwords, the end of the text before, the task, the prefix.

    Text before the window takes up less than half of the context (223 tokens); what is too much is
    cut off from the left, as in Whisper.

    Raises:
        InputError: hotwords or prefix are too long, or the model lacks the language or task.
    """
    tokens, half = recognizer.tokens, recognizer.spec.dims.text_positions // 2
    prefix = prefix_ids(tokens, options)
    room = room_before(recognizer, options)
    previous = text_ids(tokens, options.hotwords) + (window.previous[-room:] if room else ())
    language = window.language if tokens.multilingual else None
    start = tokens.prompt(language, options.task, options.timestamps)
    most = half - len(start)
    if len(prefix) > most:
        raise InputError(f"the prefix has {len(prefix)} tokens: use at most {most}")
    before = tokens.prompt(language, options.task, options.timestamps, previous)
    return [*before, *prefix]


def prefix_ids(tokens: WhisperTokens, options: DecodeOptions) -> tuple[int, ...]:
    """How the text begins; with timestamps at 0.00 s, for a model that reads words without one
    closes them at once and writes no more."""
    prefix = text_ids(tokens, options.prefix)
    return (tokens.timestamp_begin, *prefix) if prefix and options.timestamps else prefix


def room_before(recognizer: Recognizer, options: DecodeOptions) -> int:
    """Tokens of the text before a window that are told: half of the context, less the hotwords.

    Raises:
        InputError: the hotwords are too long.
    """
    most = recognizer.spec.dims.text_positions // 2 - 1
    taken = len(text_ids(recognizer.tokens, options.hotwords))
    if taken > most:
        raise InputError(f"the hotwords have {taken} tokens: use at most {most}")
    return most - taken


def rule_set(tokens: WhisperTokens, options: DecodeOptions) -> RuleSet:
    """The rules that a vocabulary and options ask for."""
    return RuleSet(
        end=tokens.eot,
        no_speech=tokens.no_speech,
        suppressed=tokens.suppressed + tokens.padding,
        suppressed_first=tokens.suppressed_first,
        timestamp_begin=tokens.timestamp_begin if options.timestamps else None,
        no_timestamps=tokens.no_timestamps,
        max_initial=round(options.max_initial_timestamp / TIMESTAMP_STEP),
        prefixed=options.timestamps and bool(text_ids(tokens, options.prefix)),
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram=options.no_repeat_ngram,
        timestamp_end=tokens.times.stop if tokens.words else None,
    )


def beam_search(options: DecodeOptions) -> BeamSearch:
    """The search that options ask for."""
    as_transformers = options.beam_search == "transformers"
    return BeamSearch(
        beams=options.beams,
        collected=options.beams if as_transformers else round(options.beams * options.patience),
        length_penalty=options.length_penalty,
        as_transformers=as_transformers,
    )


def make_prompt(prompts: Sequence[Sequence[int]], sot: int) -> Prompt:
    """Prompts of any lengths as one batch; short ones of one length as they are, others padded."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    sots = np.array([list(prompt).index(sot) for prompt in prompts], np.int32)
    width = longest = int(lengths.max())
    if longest <= PROMPT_LENGTHS[0] and (lengths == longest).all() and (sots == sots[0]).all():
        lengths, sots = lengths[0], sots[0]
    else:
        width = next((length for length in PROMPT_LENGTHS if longest <= length), longest)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Prompt(*map(jnp.asarray, (tokens, lengths, sots)))


def read(
    found: SearchResult,
    windows: Sequence[Window],
    tokens: WhisperTokens,
    most: Sequence[int],
    prefix: tuple[int, ...] = (),
    acceptance: Acceptance | None = None,
) -> list[Hypothesis]:
    """Hypotheses out of the first rows of a search's result, which `prefix` goes before.

    most: tokens that each row had room for, the end included.
    """
    hypotheses = []
    for row, window in enumerate(windows):
        length = int(found.lengths[row])
        ended = length < most[row] if found.ended is None else bool(found.ended[row])
        ids = (*prefix, *(int(token) for token in found.tokens[row, :length]))
        text = tokens.decode(ids).strip()
        hypotheses.append(
            Hypothesis(
                tokens=ids,
                text=text,
                language=window.language,
                mean_log_probability=float(found.log_probability[row]) / (length + 1),
                no_speech_probability=float(found.no_speech[row]),
                compression_ratio=compression_ratio(text),
                temperature=window.temperature,
                acceptance=acceptance and Acceptance(*(int(column[row]) for column in acceptance)),
                ended=ended,
            )
        )
    return hypotheses


def check_memory(recognizer: Recognizer, batch: int, options: DecodeOptions) -> None:
    """Raises InputError where a search certainly needs more memory than the devices have."""
    dims, chips = recognizer.spec.dims, chips_of(recognizer.params)
    size = jnp.dtype(recognizer.spec.dtype).itemsize
    texts = max(options.beams, options.best_of if options.temperature else 1)
    of_token = 2 * dims.decoder_layers * dims.width * size  # keys and values
    tokens = min(options.max_tokens, dims.text_positions)
    of_text = of_token * tokens + 2 * dims.vocab * 4  # and two rows of logits
    ended = 4 * tokens * options.beams * options.patience
    needed = batch * (of_token * dims.audio_positions + texts * of_text + ended)
    there = chips * device_memory()
    if needed > there:
        fitting = max(int(texts * there / needed / 2), 1)
        raise InputError(
            f"{texts} texts for each of {batch} windows need {needed / GIBI:,.0f} GiB and the "
            f"devices have {there / GIBI:,.0f}: follow at most {fitting} or use a smaller batch"
        )


def device_memory() -> int:
    """Bytes of the first device's memory, or of the host's where the device does not say."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return statistics.get("bytes_limit", host)
