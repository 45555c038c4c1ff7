"""A model ready to recognise: batches of windows in, texts out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.greedy import Found, Prompt, greedy
from flax_distil.decode.language import detect_language
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.rules import RuleSet
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import CHUNK_SAMPLES
from flax_distil.model.spec import Params, Spec
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import WhisperTokens, load_tokens
from flax_distil.text.wer import compression_ratio


@dataclass(frozen=True, eq=False)
class Recognizer:
    """All that recognition needs: the program, its numbers (on the device) and its vocabulary."""

    spec: Spec
    params: Params
    tokens: WhisperTokens


def make_recognizer(checkpoint: Checkpoint, dtype: str = "float32") -> Recognizer:
    """A recogniser over a checkpoint, its parameters on the device in `dtype`."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.params)
    return Recognizer(Spec(checkpoint.dims, dtype), params, load_tokens(checkpoint.source))


def recognize(
    recognizer: Recognizer, waveforms_BN: Num[np.ndarray, "B N"], options: DecodeOptions
) -> list[Hypothesis]:
    """One hypothesis a window, by greedy search.

    waveforms_BN: 16 kHz, int16 or float, N = 480,000 samples (30 s, padded with silence). The batch
        is filled up to a power of two, so that a run compiles few programs.

    Raises:
        InputError: the windows have another length, or the model lacks the language or task.
    """
    batch, samples = waveforms_BN.shape
    if samples != CHUNK_SAMPLES:
        raise InputError(f"windows have {samples} samples: pad or trim them to {CHUNK_SAMPLES}")
    if not batch:
        return []
    spec, params, tokens = recognizer.spec, recognizer.params, recognizer.tokens
    filled = 1 << (batch - 1).bit_length()
    waveforms_BN = np.pad(waveforms_BN, ((0, filled - batch), (0, 0)))
    audio_BSD = listen(spec, params["encoder"], waveforms_BN)
    languages = _languages(recognizer, audio_BSD, options)
    prompts = [tokens.prompt(code, options.task, options.timestamps) for code in languages]
    room = min(options.max_tokens, spec.dims.text_positions - len(prompts[0]))
    found = greedy(
        spec,
        params["decoder"],
        audio_BSD,
        make_prompt(prompts, tokens.sot),
        np.arange(filled) < batch,
        rule_set(tokens, options),
        room,
    )
    return read(jax.device_get(found), languages[:batch], tokens)


@partial(jax.jit, static_argnames="spec")
def listen(spec: Spec, params: Params, waveforms_BN: Num[Array, "B N"]) -> Float[Array, "B S D"]:
    """Waveforms to audio states; log-mel runs on the device. params: the encoder's."""
    return spec.encoder(params)(log_mel(waveforms_BN, spec.dims.mels))


def rule_set(tokens: WhisperTokens, options: DecodeOptions) -> RuleSet:
    """The rules that a vocabulary and options ask for."""
    return RuleSet(
        end=tokens.eot,
        no_speech=tokens.no_speech,
        suppressed=tokens.suppressed,
        suppressed_first=tokens.suppressed_first,
        timestamp_begin=tokens.timestamp_begin if options.timestamps else None,
        no_timestamps=tokens.no_timestamps,
        max_initial=round(options.max_initial_timestamp / 0.02),
    )


def make_prompt(prompts: Sequence[Sequence[int]], sot: int) -> Prompt:
    """Prompts of any lengths as one batch."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    sots = np.array([list(prompt).index(sot) for prompt in prompts], np.int32)
    if (lengths == lengths[0]).all() and (sots == sots[0]).all():
        lengths, sots = lengths[0], sots[0]
    return Prompt(*map(jnp.asarray, (tokens, lengths, sots)))


def read(found: Found, languages: Sequence[str], tokens: WhisperTokens) -> list[Hypothesis]:
    """Hypotheses out of the first rows of a search's result."""
    hypotheses = []
    for row, language in enumerate(languages):
        length = int(found.lengths[row])
        ids = tuple(int(token) for token in found.tokens[row, :length])
        text = tokens.decode(ids).strip()
        hypotheses.append(
            Hypothesis(
                tokens=ids,
                text=text,
                language=language,
                mean_log_probability=float(found.log_probability[row]) / (length + 1),
                no_speech_probability=float(found.no_speech[row]),
                compression_ratio=compression_ratio(text),
            )
        )
    return hypotheses


def _languages(recognizer: Recognizer, audio_BSD: Array, options: DecodeOptions) -> list[str]:
    batch = audio_BSD.shape[0]
    if options.language or not recognizer.tokens.multilingual:
        return [to_language_code(options.language or "en")] * batch
    spec, params = recognizer.spec, recognizer.params["decoder"]
    probabilities = detect_language(spec, params, audio_BSD, recognizer.tokens)
    return [max(row, key=row.__getitem__) for row in probabilities]
