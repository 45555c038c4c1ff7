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
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Num

from flax_distil.audio.log_mel import log_mel
from flax_distil.decode import prompts, search
from flax_distil.decode.beam import beam
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.greedy import greedy
from flax_distil.decode.speculative import speculative
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES, POSITION_SAMPLES
from flax_distil.model.generation import (
    WHOLE_WINDOW,
    context_positions,
    fitting_context,
    kept_heads,
)
from flax_distil.model.spec import Params, Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.clips import by_clip, chips_of, replicate
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import WhisperTokens
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
    timestamps: whether it learnt them; False where the generation config says that it was trained
        without (`trained_with_timestamps`).
    assistant: drafts tokens that the model verifies; the texts are the same (`make_assistant`).
    contexts: audio positions, ascending, that the decoder was taught besides all of the window
        (`audio_context` in the generation config): the encoder is given no more than a batch needs.
    """

    spec: Spec
    params: Params
    tokens: WhisperTokens
    alignment_heads: tuple[tuple[int, int], ...] = ()
    language: str | None = None
    previous_text: bool = True
    timestamps: bool = True
    assistant: Assistant | None = None
    contexts: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Positions of the decoder: tokens of prompt and text."""
        return self.spec.dims.text_positions

    @cached_property
    def decoder(self) -> search.DecoderModel:
        """The decoder as searches take it.

        On CPUs it keeps its embedding transposed: transposing takes as long as several steps
        (docs/LOG.md). That is V x D more numbers in memory.
        """
        params, head_DV = self.params["decoder"], None
        if jax.default_backend() == "cpu":
            head_DV = jnp.asarray(params["tokens"]["embedding"], self.spec.dtype).T
        return search.DecoderModel(self.spec, params, head_DV)


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
        InputError: the tokenizer is missing, damaged or another model's, or the generation config
            has a language that the model lacks.
    """
    dims, tokens, generation = checkpoint.dims, checkpoint.tokens(), checkpoint.generation
    language = None
    if tokens.multilingual and generation.get("language"):
        language = to_language_code(generation["language"].strip("<|>"))
        tokens.prompt(language)  # raises where the model lacks it
    heads = kept_heads(generation.get("alignment_heads"), dims) or ()
    return Recognizer(
        spec=Spec(dims, dtype).on(jax.local_devices()[0]),
        params=replicate(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.params)),
        tokens=tokens,
        alignment_heads=tuple((layer, head) for layer, head in heads),
        language=language,
        previous_text=generation.get("condition_on_prev_tokens") is not False,
        timestamps=generation.get("trained_with_timestamps") is not False,
        contexts=context_positions(generation.get("audio_context") or ()),
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
) -> list[search.Hypothesis]:
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
    batch, samples = waveforms_BN.shape
    if samples != CHUNK_SAMPLES:
        raise InputError(f"windows have {samples} samples: pad or trim them to {CHUNK_SAMPLES}")
    if not batch:
        return []
    start = prepare(recognizer, options, batch, language, prompt, temperature)
    states = encode_audio(recognizer, pad_batch(waveforms_BN), temperature)
    windows = [replace(start, seed=seed + row) for row in range(batch)]
    return decode(recognizer, states, options, windows)


def prepare(
    recognizer: Recognizer,
    options: DecodeOptions,
    batch: int,
    language: str | None = None,
    prompt: str | None = None,
    temperature: float = 0.0,
) -> search.Window:
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
    check_memory(recognizer, batch, options, temperature)
    tokens, context = recognizer.tokens, recognizer.context
    code = to_language_code(language) if language else recognizer.language
    tokens.prompt(code or ("en" if tokens.multilingual else None), options.task)  # may raise
    previous = prompts.text_ids(tokens, prompt)
    if len(previous) > (most := prompts.previous_room(tokens, context, options)):
        log.warning("the prompt has %d tokens: its last %d are used", len(previous), most)
    prompts.prompt_ids(tokens, context, options, search.Window(code or "en", previous))  # may raise
    return search.Window(code, previous, temperature)


def encode_audio(
    recognizer: Recognizer,
    sound: Num[np.ndarray, "B N"] | Float[np.ndarray, "B T M"],
    temperature: float = 0.0,
    drafting: bool = True,
) -> AudioStates:
    """Audio states of a padded batch, for the drafter too where tokens will be drafted.

    sound: waveforms or log-mel. temperature: at which it will be decoded. drafting: False where the
    assistant is not to be used.

    Zeros behind the longest clip are left out as far as the model's contexts allow.

    Where several rows keep a CPU busy, verifying some tokens costs as much as writing them, so the
    assistant is not used. It always is where tokens are drawn: a draw must not depend on the batch.
    """
    assistant = recognizer.assistant
    part, positions = shortened(recognizer, sound)
    model_BSD = encode(recognizer.spec, recognizer.params["encoder"], part, positions)
    few = jax.default_backend() != "cpu" or len(sound) <= CPU_DRAFT_ROWS
    if assistant is None or not drafting or not (few or temperature > 0):
        return AudioStates(model_BSD)
    if assistant.encoder is None:
        return AudioStates(model_BSD, model_BSD)
    return AudioStates(model_BSD, encode(*assistant.encoder, sound))


def shortened(
    recognizer: Recognizer, sound: Num[np.ndarray, "B N"] | Float[np.ndarray, "B T M"]
) -> tuple[np.ndarray, int | None]:
    """The part of `sound` that the encoder has to be given, and its positions; None for all."""
    if not recognizer.contexts:
        return sound, None
    step = 2 if sound.ndim == 3 else POSITION_SAMPLES  # frames or samples of a position
    other = tuple(axis for axis in range(sound.ndim) if axis != 1)
    used = np.flatnonzero(sound.any(axis=other))
    positions = -(-(int(used[-1]) + 1) // step) if len(used) else 0
    positions = fitting_context(recognizer.contexts, positions)
    if positions == WHOLE_WINDOW:
        return sound, None
    # The last frame reaches over the end: into zeros here, as in the whole window.
    return sound[:, : (positions + 1) * step], positions


@by_clip(static=("spec", "positions"))
def encode(
    spec: Spec,
    params: Params,
    sound: Num[Array, "B N"] | Float[Array, "B T M"],
    positions: int | None = None,
) -> Float[Array, "B S D"]:
    """Audio states of waveforms, whose log-mel is computed on the device, or of log-mel.

    params: the encoder's. positions: how many states, S; all by default. CPUs take one clip after
    the other, which stays in their cache (docs/LOG.md).
    """

    def together(sound: Array) -> Array:
        mel_BTM = sound if sound.ndim == 3 else log_mel(sound, spec.dims.mels)
        if positions is not None:
            mel_BTM = mel_BTM[:, : 2 * positions]
        return spec.encoder(params)(mel_BTM)

    def in_turn(sound: Array) -> Array:
        return jax.lax.map(lambda one: together(one[None])[0], sound)

    return jax.lax.platform_dependent(sound, cpu=in_turn, default=together)


def detect_language(
    recognizer: Recognizer, audio_BSD: Float[Array, "B S D"]
) -> list[dict[str, float]]:
    """Probability of every language of a multilingual model, for each row."""
    tokens, params = recognizer.tokens, recognizer.params["decoder"]
    codes, ids = tuple(tokens.languages), tuple(tokens.languages.values())
    probability_BL = jax.device_get(_detect(recognizer.spec, params, audio_BSD, tokens.sot, ids))
    return [dict(zip(codes, row.tolist(), strict=True)) for row in probability_BL]


@by_clip(static=("spec", "sot", "languages"))
def _detect(
    spec: Spec, params: Params, audio_BSD: Array, sot: int, languages: tuple[int, ...]
) -> Array:
    decoder = spec.decoder(params)
    start_B1 = jnp.full((audio_BSD.shape[0], 1), sot)
    logits_BV = decoder.logits(decoder(start_B1, audio_BSD))[:, 0]
    return jax.nn.softmax(logits_BV[:, jnp.array(languages)])


def likeliest_languages(recognizer: Recognizer, audio_BSD: Float[Array, "B S D"]) -> list[str]:
    """The code of each row's likeliest language."""
    if not recognizer.tokens.multilingual:
        return ["en"] * len(audio_BSD)
    return [max(row, key=row.__getitem__) for row in detect_language(recognizer, audio_BSD)]


def decode(
    recognizer: Recognizer,
    states: AudioStates,
    options: DecodeOptions,
    windows: Sequence[search.Window],
) -> list[search.Hypothesis]:
    """One hypothesis for each of `windows`, whose audio states are the first rows of `states`.

    Where `states` has the drafter's, tokens are drafted and verified (speculative decoding). A
    window's language is detected where it is None.

    Raises:
        InputError: hotwords or prefix are too long, or the model lacks the language or task.
    """
    tokens, context, rows = recognizer.tokens, recognizer.context, len(states.model_BSD)
    if any(window.language is None for window in windows):
        codes = likeliest_languages(recognizer, states.model_BSD)
        windows = [
            replace(window, language=window.language or code)
            for window, code in zip(windows, codes, strict=False)
        ]
    ids = [prompts.prompt_ids(tokens, context, options, window) for window in windows]
    arguments = (
        prompts.make_prompt(ids + [ids[0]] * (rows - len(ids)), tokens.sot),
        jnp.arange(rows) < len(windows),
        prompts.make_sampling(windows, rows),
    )
    where = jax.tree.leaves(recognizer.params)[0].sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    batch = search.SearchInput(states.model_BSD, *jax.device_put(arguments, where))
    # The same for any prompt, since it decides the program: a search ends where the context does.
    room = min(options.max_tokens, context)
    model, assistant, drawn = recognizer.decoder, recognizer.assistant, batch.sampling is not None
    limits = {"rules": prompts.rule_set(tokens, options), "max_tokens": room}
    if assistant is not None and states.drafter_BSE is not None:
        result = speculative(
            model,
            batch,
            drafter=assistant.drafter,
            draft_audio_BSE=states.drafter_BSE,
            draft_tokens=assistant.draft_tokens,
            **limits,
        )
    else:
        limits["length_penalty"] = options.length_penalty
        if options.beams > 1 and not drawn:
            collected = round(options.beams * options.patience)
            result = beam(model, batch, beams=options.beams, collected=collected, **limits)
        else:
            result = greedy(model, batch, copies=options.best_of if drawn else 1, **limits)
    limits_of_rows = [min(room, context + 1 - len(prompt)) for prompt in ids]
    prefix = prompts.prefix_ids(tokens, options)
    return read_hypotheses(jax.device_get(result), windows, tokens, limits_of_rows, prefix)


def read_hypotheses(
    result: search.SearchResult,
    windows: Sequence[search.Window],
    tokens: WhisperTokens,
    limits: Sequence[int],
    prefix: tuple[int, ...] = (),
) -> list[search.Hypothesis]:
    """Hypotheses from the first rows of a search's result, each after `prefix`.

    limits: most tokens of each row, the end of text included.
    """
    hypotheses = []
    for row, window in enumerate(windows):
        length, acceptance = int(result.lengths[row]), result.acceptance
        if acceptance is not None:
            acceptance = search.Acceptance(*(int(column[row]) for column in acceptance))
        ids = (*prefix, *(int(token) for token in result.tokens[row, :length]))
        text = tokens.decode(ids).strip()
        hypotheses.append(
            search.Hypothesis(
                tokens=ids,
                text=text,
                language=window.language or "en",
                mean_log_probability=float(result.log_probability[row]) / (length + 1),
                no_speech_probability=float(result.no_speech[row]),
                compression_ratio=compression_ratio(text),
                temperature=window.temperature,
                acceptance=acceptance,
                ended=length < limits[row] if result.ended is None else bool(result.ended[row]),
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
    dims, batch = recognizer.spec.dims, batch_bucket(batch)
    size = jnp.dtype(recognizer.spec.dtype).itemsize
    texts = max(options.beams, options.best_of if temperature else 1)
    of_token = 2 * dims.decoder_layers * dims.width * size  # keys and values
    tokens = min(options.max_tokens, dims.text_positions)
    of_text = of_token * tokens + 2 * dims.vocab * 4  # and two rows of logits
    ended = 4 * tokens * options.beams * options.patience
    needed = batch * (of_token * dims.audio_positions + texts * of_text + ended)
    available = chips_of(recognizer.params) * device_memory()
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
