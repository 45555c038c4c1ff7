"""A model ready to recognise speech: batches of windows in, texts out."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.beam import beam
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.greedy import greedy
from flax_distil.decode.hypothesis import Acceptance, Hypothesis, Window
from flax_distil.decode.language import detect_language, only_language
from flax_distil.decode.prompts import (
    make_prompt,
    prefix_ids,
    previous_room,
    prompt_ids,
    text_ids,
)
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import DecoderModel, Sampling, SearchInput, SearchResult
from flax_distil.decode.speculative import speculative
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES
from flax_distil.model.generation import kept_heads
from flax_distil.model.spec import Params, Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.clips import by_clip, chips_of, replicate
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens
from flax_distil.text.wer import compression_ratio

log = logging.getLogger(__name__)

CPU_DRAFT_ROWS = 1  # with more, greedy search is faster than any assistant (docs/LOG.md)
GIBI = 2**30
GREEDY = DecodeOptions()


@dataclass(frozen=True, eq=False)
class Recognizer:
    """The program, its parameters (on the device) and its vocabulary.

    alignment_heads: (layer, head) of the cross-attention that follows the speech; empty where they
        are not known.
    language: code of the only language that it was trained on, according to its generation config:
        used where no language is given. Without it the language is detected.
    previous_text: whether windows of long recordings get the text before them as prompt; False
        where the generation config says that the model was trained without
        (`condition_on_prev_tokens`).
    assistant: drafts tokens that the model verifies (`with_assistant`).
    """

    spec: Spec
    params: Params
    tokens: WhisperTokens
    alignment_heads: tuple[tuple[int, int], ...] = ()
    language: str | None = None
    previous_text: bool = True
    assistant: Assistant | None = None

    def with_assistant(self, assistant: Assistant | None) -> "Recognizer":
        """The same recogniser, which returns the same texts by speculative decoding."""
        return replace(self, assistant=assistant)

    @property
    def context(self) -> int:
        """Positions of the decoder: tokens of prompt and text."""
        return self.spec.dims.text_positions

    @cached_property
    def decoder(self) -> DecoderModel:
        """The decoder as searches take it.

        On CPUs it keeps its embedding transposed: transposing takes as long as several steps
        (docs/LOG.md). That is V x D more numbers in memory.
        """
        params, head_DV = self.params["decoder"], None
        if jax.default_backend() == "cpu":
            head_DV = jnp.asarray(params["tokens"]["embedding"], self.spec.dtype).T
        return DecoderModel(self.spec, params, head_DV)


class AudioStates(NamedTuple):
    """The encoders' outputs for a batch of windows.

    model_BSD: the model's. drafter_BSE: what the assistant's drafter reads, the same array where
    they share an encoder; None where no tokens are drafted.
    """

    model_BSD: Float[Array, "B S D"]
    drafter_BSE: Float[Array, "B S E"] | None = None


def make_recognizer(checkpoint: Checkpoint, dtype: str = "float32") -> Recognizer:
    """A recogniser of a checkpoint, its parameters in `dtype` on all chips of this process.

    Raises:
        InputError: the tokenizer is missing, damaged or another model's.
    """
    dims, tokens = checkpoint.dims, checkpoint.tokens()
    heads = kept_heads(checkpoint.generation.get("alignment_heads"), dims) or ()
    params = replicate(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.params))
    return Recognizer(
        spec=Spec(dims, dtype).on(jax.local_devices()[0]),
        params=params,
        tokens=tokens,
        alignment_heads=tuple((layer, head) for layer, head in heads),
        language=only_language(checkpoint.generation, tokens),
        previous_text=checkpoint.generation.get("condition_on_prev_tokens") is not False,
    )


def recognize(
    recognizer: Recognizer,
    waveforms_BN: Num[np.ndarray, "B N"],
    options: DecodeOptions = GREEDY,
    *,
    language: str | None = None,
    prompt: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Hypothesis]:
    """One hypothesis a window, by greedy search, beam search or sampling.

    waveforms_BN: 16 kHz, int16 or float, N = 480,000 samples (30 s, padded with silence). The batch
        is padded to a power of two, so that a run compiles few programs.
    language: code or name; without it the language of each window is detected.
    prompt: text before the windows, for names and style. Its last 223 tokens count.
    temperature: above 0 tokens are drawn, and beams are not used.
    seed: random seed of the first row for sampling; the next row has the next one.

    Raises:
        InputError: the windows have another length, the model lacks the language or task, the
            device the memory, or the assistant cannot be used with this search.
    """
    return recognize_with_states(
        recognizer,
        waveforms_BN,
        options,
        language=language,
        prompt=prompt,
        temperature=temperature,
        seed=seed,
    )[0]


def recognize_with_states(
    recognizer: Recognizer,
    waveforms_BN: Num[np.ndarray, "B N"],
    options: DecodeOptions,
    *,
    language: str | None = None,
    prompt: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[Hypothesis], Float[Array, "P S D"] | None]:
    """`recognize`, and the audio states of the padded batch; None where there is no window."""
    batch, samples = waveforms_BN.shape
    if samples != CHUNK_SAMPLES:
        raise InputError(f"windows have {samples} samples: pad or trim them to {CHUNK_SAMPLES}")
    if not batch:
        return [], None
    start = prepare(recognizer, options, batch, language, prompt, temperature)
    states = encode_audio(recognizer, pad_batch(waveforms_BN), temperature)
    languages = [start.language] * batch
    if start.language is None:
        languages = likeliest_languages(recognizer, states.model_BSD)[:batch]
    windows = [replace(start, language=code, seed=seed + row) for row, code in enumerate(languages)]
    return decode(recognizer, states, options, windows), states.model_BSD


def prepare(
    recognizer: Recognizer,
    options: DecodeOptions,
    batch: int,
    language: str | None = None,
    prompt: str | None = None,
    temperature: float = 0.0,
) -> Window:
    """Checks a search before any work; returns what its windows have in common.

    The window's language is that asked for, the only one that the model has, or None.

    Raises:
        InputError: the model lacks the language or task, the device the memory, hotwords or prefix
            are too long, or the assistant cannot be used with this search.
    """
    if not temperature >= 0:
        raise InputError(f"temperature is {temperature}: it must be at least 0")
    drawn = options.best_of if temperature else 1
    if recognizer.assistant and (options.beams, drawn) != (1, 1):
        raise InputError(
            f"an assistant cannot help {options.beams} beams and the best of {drawn} texts: use "
            "one of each, or no assistant"
        )
    check_memory(recognizer, batch_bucket(batch), options, temperature)
    tokens = recognizer.tokens
    code = to_language_code(language) if language else recognizer.language
    tokens.prompt(code or ("en" if tokens.multilingual else None), options.task)  # may raise
    previous = text_ids(tokens, prompt)
    if len(previous) > (most := previous_room(tokens, recognizer.context, options)):
        log.warning("the prompt has %d tokens: its last %d are used", len(previous), most)
    prompt_ids(tokens, recognizer.context, options, Window(code or "en", previous))  # may raise
    return Window(code, previous, temperature)


def encode_audio(
    recognizer: Recognizer,
    sound: Num[np.ndarray, "B N"] | Float[np.ndarray, "B T M"],
    temperature: float = 0.0,
    drafting: bool = True,
) -> AudioStates:
    """Audio states of a padded batch, for the drafter too where tokens will be drafted.

    sound: waveforms or log-mel. temperature: at which it will be decoded. drafting: False where the
    assistant is not to be used.

    Where several rows keep a CPU busy, verifying some tokens costs as much as writing them, so the
    assistant is not used. It always is where tokens are drawn: a draw must not depend on the batch.
    """
    assistant = recognizer.assistant
    model_BSD = encode(recognizer.spec, recognizer.params["encoder"], sound)
    few = jax.default_backend() != "cpu" or len(sound) <= CPU_DRAFT_ROWS
    if assistant is None or not drafting or not (few or temperature > 0):
        return AudioStates(model_BSD)
    if assistant.encoder is None:
        return AudioStates(model_BSD, model_BSD)
    return AudioStates(model_BSD, encode(*assistant.encoder, sound))


@by_clip(static=("spec",))
def encode(
    spec: Spec, params: Params, sound: Num[Array, "B N"] | Float[Array, "B T M"]
) -> Float[Array, "B S D"]:
    """Audio states of waveforms, whose log-mel is computed on the device, or of log-mel.

    params: the encoder's. CPUs take one clip after the other, which stays in their cache
    (docs/LOG.md).
    """

    def together(sound: Array) -> Array:
        mel_BTM = sound if sound.ndim == 3 else log_mel(sound, spec.dims.mels)
        return spec.encoder(params)(mel_BTM)

    def in_turn(sound: Array) -> Array:
        return jax.lax.map(lambda one: together(one[None])[0], sound)

    return jax.lax.platform_dependent(sound, cpu=in_turn, default=together)


def likeliest_languages(recognizer: Recognizer, audio_BSD: Float[Array, "B S D"]) -> list[str]:
    """The code of each row's likeliest language."""
    if not recognizer.tokens.multilingual:
        return ["en"] * len(audio_BSD)
    spec, params = recognizer.spec, recognizer.params["decoder"]
    probabilities = detect_language(spec, params, audio_BSD, recognizer.tokens)
    return [max(row, key=row.__getitem__) for row in probabilities]


def decode(
    recognizer: Recognizer,
    states: AudioStates,
    options: DecodeOptions,
    windows: Sequence[Window],
) -> list[Hypothesis]:
    """One hypothesis for each of `windows`, whose audio states are the first rows of `states`.

    Where `states` has the drafter's, tokens are drafted and verified (speculative decoding).

    Raises:
        InputError: hotwords or prefix are too long, or the model lacks the language or task.
    """
    tokens, context, rows = recognizer.tokens, recognizer.context, len(states.model_BSD)
    prompts = [prompt_ids(tokens, context, options, window) for window in windows]
    padded = prompts + [prompts[0]] * (rows - len(prompts))
    # The same for any prompt, since it decides the program: a search ends where the context does.
    room = min(options.max_tokens, context)
    batch = SearchInput(
        audio_BSD=states.model_BSD,
        prompt=make_prompt(padded, tokens.sot),
        active_B=jnp.arange(rows) < len(windows),
        sampling=sampling(windows, rows),
    )
    result = search(recognizer, batch, states.drafter_BSE, options, room)
    limits = [min(room, context + 1 - len(prompt)) for prompt in prompts]
    return read_hypotheses(
        jax.device_get(result), windows, tokens, limits, prefix_ids(tokens, options)
    )


def search(
    recognizer: Recognizer,
    batch: SearchInput,
    drafter_BSE: Float[Array, "B S E"] | None,
    options: DecodeOptions,
    room: int,
) -> SearchResult:
    """The result of the search that `options` describe, of at most `room` tokens."""
    model, drawn = recognizer.decoder, batch.sampling is not None
    limits = {"rules": rule_set(recognizer.tokens, options), "max_tokens": room}
    if recognizer.assistant is not None and drafter_BSE is not None:
        return speculative(
            model,
            batch,
            drafter=recognizer.assistant.drafter,
            draft_audio_BSE=drafter_BSE,
            draft_tokens=recognizer.assistant.draft_tokens,
            **limits,
        )
    penalty = options.length_penalty
    if options.beams > 1 and not drawn:
        collected = round(options.beams * options.patience)
        return beam(
            model,
            batch,
            beams=options.beams,
            collected=collected,
            length_penalty=penalty,
            **limits,
        )
    copies = options.best_of if drawn else 1
    return greedy(model, batch, copies=copies, length_penalty=penalty, **limits)


def sampling(windows: Sequence[Window], rows: int) -> Sampling | None:
    """Temperatures and seeds of a batch of `rows`; None where nothing is drawn."""
    if not any(window.temperature > 0 for window in windows):
        return None
    padding = (0, rows - len(windows))
    temperature_B = np.array([window.temperature for window in windows], np.float32)
    seed_B = np.array([window.seed % 2**31 for window in windows], np.int32)
    padded = (np.pad(column_B, padding) for column_B in (temperature_B, seed_B))
    return Sampling(*map(jnp.asarray, padded))


def rule_set(tokens: WhisperTokens, options: DecodeOptions) -> RuleSet:
    """The rules for a vocabulary and options."""
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


def read_hypotheses(
    result: SearchResult,
    windows: Sequence[Window],
    tokens: WhisperTokens,
    limits: Sequence[int],
    prefix: tuple[int, ...] = (),
) -> list[Hypothesis]:
    """Hypotheses from the first rows of a search's result, each after `prefix`.

    limits: most tokens of each row, the end of text included.
    """
    hypotheses = []
    for row, window in enumerate(windows):
        length, acceptance = int(result.lengths[row]), result.acceptance
        ended = length < limits[row] if result.ended is None else bool(result.ended[row])
        ids = (*prefix, *(int(token) for token in result.tokens[row, :length]))
        text = tokens.decode(ids).strip()
        hypotheses.append(
            Hypothesis(
                tokens=ids,
                text=text,
                language=window.language or "en",
                mean_log_probability=float(result.log_probability[row]) / (length + 1),
                no_speech_probability=float(result.no_speech[row]),
                compression_ratio=compression_ratio(text),
                temperature=window.temperature,
                acceptance=acceptance and Acceptance(*(int(column[row]) for column in acceptance)),
                ended=ended,
            )
        )
    return hypotheses


def batch_bucket(batch: int) -> int:
    """The power of two that a batch is padded to."""
    return 1 << max(batch - 1, 0).bit_length()


def pad_batch(array: np.ndarray) -> np.ndarray:
    """The batch with rows of zeros up to the next power of two."""
    missing = batch_bucket(len(array)) - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def check_memory(
    recognizer: Recognizer, batch: int, options: DecodeOptions, temperature: float = 0.0
) -> None:
    """Raises InputError where a search certainly needs more memory than the devices have."""
    dims, chips = recognizer.spec.dims, chips_of(recognizer.params)
    size = jnp.dtype(recognizer.spec.dtype).itemsize
    texts = max(options.beams, options.best_of if temperature else 1)
    of_token = 2 * dims.decoder_layers * dims.width * size  # keys and values
    tokens = min(options.max_tokens, dims.text_positions)
    of_text = of_token * tokens + 2 * dims.vocab * 4  # and two rows of logits
    ended = 4 * tokens * options.beams * options.patience
    needed = batch * (of_token * dims.audio_positions + texts * of_text + ended)
    available = chips * device_memory()
    if needed > available:
        fitting = max(int(texts * available / needed / 2), 1)
        raise InputError(
            f"{texts} texts for each of {batch} windows need {needed / GIBI:,.0f} GiB and the "
            f"devices have {available / GIBI:,.0f}: follow at most {fitting} or use a smaller batch"
        )


def device_memory() -> int:
    """Bytes of the first device's memory, or of the host's where the device does not report it."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return statistics.get("bytes_limit", host)
