"""Greedy search: one compiled loop over a static cache, on the device from first to last token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_distil.decode.rules import Progress, RuleSet, advance, apply, begin
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache, Decoder


class Prompt(NamedTuple):
    """What the decoder reads before it writes.

    tokens: padded on the right.
    length: how many of them count: a scalar where all rows have as many, else one a row.
    sot: where the start of transcript stands, in the form of `length`.
    """

    tokens: Int[Array, "B P"]
    length: Int[Array, "..."]
    sot: Int[Array, "..."]


class Found(NamedTuple):
    """What a search returns, padded to static shapes.

    tokens: without the prompt, filled up with the end token.
    lengths: tokens before the end.
    log_probability: sum over the tokens, the end included where it was reached.
    no_speech: probability of the no-speech token at the start of transcript.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    log_probability: Float[Array, " B"]
    no_speech: Float[Array, " B"]


class _Loop(NamedTuple):
    cache: Cache
    logits_BV: Array
    found: Found
    done_B: Array
    progress: Progress


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


@partial(jax.jit, static_argnames=("spec", "rules", "max_tokens"))
def greedy(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    prompt: Prompt,
    active_B: Bool[Array, " B"],
    rules: RuleSet,
    max_tokens: int,
) -> Found:
    """The most probable next token, until every row has ended or `max_tokens` are written.

    params: the decoder's. active_B: False on rows that only fill up the batch; they write nothing.
    """
    batch = prompt.tokens.shape[0]
    decoder = spec.decoder(params)
    project, allowed = decoder.projection(), rules.rules()

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BV, found, done_B, progress = loop
        log_probability_BV = jax.nn.log_softmax(apply(allowed, logits_BV, progress))
        token_B = jnp.where(done_B, rules.end, log_probability_BV.argmax(-1))
        gain_B = jnp.take_along_axis(log_probability_BV, token_B[:, None], axis=-1)[:, 0]
        ended_B = done_B | (token_B == rules.end)
        found = found._replace(
            tokens=found.tokens.at[:, progress.index].set(token_B),
            lengths=found.lengths + ~ended_B,
            log_probability=found.log_probability + jnp.where(done_B, 0, gain_B),
        )
        hidden_B1D, cache = decoder.step(token_B[:, None], cache)
        progress = advance(progress, token_B, rules)
        return _Loop(cache, project(hidden_B1D)[:, 0], found, ended_B, progress)

    hidden_B2D, cache = prefill(decoder, audio_BSD, prompt, max_tokens)
    logits_B2V = project(hidden_B2D)
    nothing = Found(
        tokens=jnp.full((batch, max_tokens), rules.end, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        log_probability=jnp.zeros(batch, jnp.float32),
        no_speech=jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech],
    )
    start = _Loop(cache, logits_B2V[:, 1], nothing, ~active_B, begin(batch))
    return jax.lax.while_loop(more, write, start).found
