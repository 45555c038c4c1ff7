"""What all searches share: their arguments, their result, reading the prompt, ranking tokens."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_distil.decode.hypothesis import Acceptance
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache, Decoder


@partial(jax.tree_util.register_dataclass, data_fields=["params", "head_DV"], meta_fields=["spec"])
@dataclass(frozen=True, eq=False)
class DecoderModel:
    """A decoder that searches run.

    params: the decoder's.
    head_DV: the embedding transposed, where the caller keeps it (`Recognizer.head_DV`).
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
    empty = decoder.start(audio_BSD, padded + room)
    hidden_BPD, cache = decoder.step(prompt.tokens, empty)
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
        last = logits.shape[-1] - 1
        equal = logits == logits.max(axis=-1, keepdims=True)
        return jnp.where(equal, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)

    at_once = lambda logits: logits.argmax(axis=-1).astype(jnp.int32)
    return jax.lax.platform_dependent(logits, cpu=in_two, default=at_once)


def text_score(
    log_probability: Float[Array, "..."], lengths: Int[Array, "..."], penalty: float | None
) -> Float[Array, "..."]:
    """What openai-whisper ranks texts by: the mean, or Wu et al.'s penalty (arXiv 1609.08144)."""
    if penalty is None:
        return log_probability / jnp.maximum(lengths, 1)
    return log_probability / ((5 + lengths) / 6) ** penalty
