"""What searches take and return, and the steps that they share."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache, Decoder


@dataclass(frozen=True)
class Window:
    """What a window is decoded with, beside its sound and the options of the search.

    language: code; None until it is detected.
    previous: tokens of the text before it.
    temperature: above 0 tokens are drawn.
    seed: random seed for sampling.
    """

    language: str | None = None
    previous: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class Acceptance(NamedTuple):
    """Counts of an assistant's draft tokens: integers, one a row (arrays) or one for all.

    passes: of the model, the prompt's included.
    drafted, accepted: draft tokens that the model verified, and those that it accepted.
    written: tokens of the text, the end of text included.
    """

    passes: Any
    drafted: Any
    accepted: Any
    written: Any

    @property
    def rate(self) -> float:
        """Part of the draft tokens that were accepted, over all rows."""
        return float(np.sum(self.accepted) / max(np.sum(self.drafted), 1))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass of the model yields, over all rows; 1 without an assistant."""
        return float(np.sum(self.written) / max(np.sum(self.passes), 1))

    @classmethod
    def total(cls, parts: Iterable["Acceptance | None"]) -> "Acceptance | None":
        """The sums over all parts; None where no assistant was used."""
        known = [part for part in parts if part is not None]
        return cls(*np.sum(known, axis=0).tolist()) if known else None


@dataclass(frozen=True)
class Hypothesis:
    """The text of one window.

    mean_log_probability: of the tokens and the end of text, Whisper's `avg_logprob`, from the
        distribution after suppression.
    no_speech_probability: of the no-speech token at the start of transcript.
    temperature: at which it was decoded.
    acceptance: of an assistant's draft tokens, where one was used.
    ended: whether the model ended the text; False where it was cut at `max_tokens`.
    """

    tokens: tuple[int, ...]
    text: str
    language: str
    mean_log_probability: float
    no_speech_probability: float
    compression_ratio: float
    temperature: float = 0.0
    acceptance: Acceptance | None = None
    ended: bool = True


@partial(jax.tree_util.register_dataclass, data_fields=["params", "head_DV"], meta_fields=["spec"])
@dataclass(frozen=True, eq=False)
class DecoderModel:
    """A decoder that searches run.

    params: the decoder's.
    head_DV: the embedding transposed, where the caller keeps it (`Recognizer.decoder`).
    """

    spec: Spec
    params: Params
    head_DV: Array | None = None

    def decoder(self) -> Decoder:
        """The module."""
        return self.spec.decoder(self.params)


class Prompt(NamedTuple):
    """The tokens that the decoder reads before the text.

    tokens: padded on the right.
    length: tokens without padding: a scalar where all rows have the same, else one a row.
    sot: position of the start of transcript, a scalar or one a row as `length`.
    """

    tokens: Int[Array, "B P"]
    length: Int[Array, "..."]
    sot: Int[Array, "..."]


class Sampling(NamedTuple):
    """Tokens are drawn where `temperature` is above 0; elsewhere the most probable ones are taken.

    Each row draws from its own seed, so its text does not depend on the other rows.
    """

    temperature: Float[Array, " B"]
    seed: Int[Array, " B"]


class SearchInput(NamedTuple):
    """A batch of windows.

    audio_BSD: audio states.
    active_B: False on rows that pad the batch; no text is written for them.
    sampling: how tokens are drawn; None for the most probable ones.
    """

    audio_BSD: Float[Array, "B S D"]
    prompt: Prompt
    active_B: Bool[Array, " B"]
    sampling: Sampling | None = None


class SearchResult(NamedTuple):
    """The texts that a search found, padded to static shapes.

    tokens: without the prompt, padded with the end of text.
    lengths: tokens before the end of text.
    log_probability: sum over the tokens, the end of text included where it was reached.
    no_speech: probability of the no-speech token at the start of transcript.
    ended: whether the end of text was reached; None where `lengths` below the limit imply it.
    acceptance: of draft tokens, in speculative decoding.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    log_probability: Float[Array, " B"]
    no_speech: Float[Array, " B"]
    ended: Bool[Array, " B"] | None = None
    acceptance: Acceptance | None = None


def prefill(
    decoder: Decoder, audio_BSD: Float[Array, "B S D"], prompt: Prompt, room: int
) -> tuple[Float[Array, "B 2 D"], Cache]:
    """Reads the prompt into a cache with room for `room` more tokens.

    Returns the hidden states at the start of transcript and at the prompt's end, and the cache.
    """
    batch, padded = prompt.tokens.shape
    hidden_BPD, cache = decoder.step(prompt.tokens, decoder.start(audio_BSD, padded + room))
    where = jnp.stack([prompt.sot, prompt.length - 1], axis=-1)
    where_B2 = jnp.broadcast_to(where, (batch, 2))
    hidden_B2D = jnp.take_along_axis(hidden_BPD, where_B2[..., None], axis=1)
    return hidden_B2D, cache._replace(length=prompt.length)


def repeat_cache(cache: Cache, copies: int) -> Cache:
    """A cache for `copies` texts of each clip, which share the clip's cross-attention."""
    own = cache.rows(partial(jnp.repeat, repeats=copies))
    length = jnp.repeat(cache.length, copies) if cache.length.ndim else cache.length
    return Cache(own, cache.cross, length)


def likeliest(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """`argmax`: the first of the largest.

    XLA's own compares one number after the other on CPUs; the maximum and the first position that
    equals it are found many numbers at a time, ten times as fast (docs/LOG.md).
    """

    def in_two(logits: Array) -> Array:
        equal = logits == logits.max(axis=-1, keepdims=True)
        place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.where(equal, place, logits.shape[-1] - 1).min(axis=-1)

    at_once = lambda logits: logits.argmax(axis=-1).astype(jnp.int32)
    return jax.lax.platform_dependent(logits, cpu=in_two, default=at_once)


def at_temperature(logits: Float[Array, "B ... V"], sampling: Sampling) -> Float[Array, "B ... V"]:
    """Logits at each row's temperature; at 0 the most probable token has probability 1."""
    temperature_B = jnp.maximum(sampling.temperature, 1e-6)
    return logits / temperature_B.reshape(-1, *[1] * (logits.ndim - 1))


def draw_tokens(scores_BV: Float[Array, "B V"], keys_B: Array) -> Int[Array, " B"]:
    """Tokens, from unnormalised log-probabilities."""
    return jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)


def text_score(
    log_probability: Float[Array, "..."], lengths: Int[Array, "..."], penalty: float | None
) -> Float[Array, "..."]:
    """What openai-whisper ranks texts by: the mean, or Wu et al.'s penalty (arXiv 1609.08144)."""
    if penalty is None:
        return log_probability / jnp.maximum(lengths, 1)
    return log_probability / ((5 + lengths) / 6) ** penalty
