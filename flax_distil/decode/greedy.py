"""Greedy search and sampling: one compiled loop over a static cache, on the device throughout."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_distil.decode.rules import Progress, RuleSet, advance, apply, begin
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache, Decoder
from flax_distil.parallel.clips import by_clip


class Prompt(NamedTuple):
    """What the decoder reads before it writes.

    tokens: padded on the right.
    length: how many of them count: a scalar where all rows have as many, else one a row.
    sot: where the start of transcript stands, in the form of `length`.
    """

    tokens: Int[Array, "B P"]
    length: Int[Array, "..."]
    sot: Int[Array, "..."]


class Sampling(NamedTuple):
    """Tokens are drawn where `temperature` is above 0, and the most probable ones taken elsewhere.

    Each row draws from a seed of its own: what it writes does not depend on its neighbours.
    """

    temperature: Float[Array, " B"]
    seed: Int[Array, " B"]


class SearchResult(NamedTuple):
    """What a search returns, padded to static shapes.

    tokens: without the prompt, filled up with the end token.
    lengths: tokens before the end.
    log_probability: sum over the tokens, the end included where it was reached.
    no_speech: probability of the no-speech token at the start of transcript.
    ended: whether the end was reached; None where `lengths` tell: below what there was room for.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, " B"]
    log_probability: Float[Array, " B"]
    no_speech: Float[Array, " B"]
    ended: Bool[Array, " B"] | None = None


class _Loop(NamedTuple):
    cache: Cache
    logits_BV: Array
    found: SearchResult
    done_B: Array
    progress: Progress


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


def multiply(cache: Cache, copies: int) -> Cache:
    """Room for `copies` texts over each clip, which share the clip's cross-attention."""
    own = cache.rows(partial(jnp.repeat, repeats=copies))
    length = jnp.repeat(cache.length, copies) if cache.length.ndim else cache.length
    return Cache(own, cache.cross, length)


@by_clip(static=("spec", "rules", "max_tokens", "copies", "length_penalty"))
def greedy(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    prompt: Prompt,
    active_B: Bool[Array, " B"],
    rules: RuleSet,
    max_tokens: int,
    sampling: Sampling | None = None,
    copies: int = 1,
    length_penalty: float | None = None,
    head_DV: Float[Array, "D V"] | None = None,
) -> SearchResult:
    """The most probable next token, until every row has ended or `max_tokens` are written.

    params: the decoder's. active_B: False on rows that only fill up the batch; they write nothing.
    sampling: draws tokens instead; the best of `copies` texts is returned (`score` says which).
    head_DV: the embedding transposed, where the caller keeps it (`Recognizer.head_DV`).
    """
    decoder = spec.decoder(params)
    project, allowed = decoder.projection(head_DV), rules.rules()
    hidden_B2D, cache = prefill(decoder, audio_BSD, prompt, max_tokens)
    logits_B2V = project(hidden_B2D)
    no_speech_B = jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech]
    cache = multiply(cache, copies)
    batch = prompt.tokens.shape[0] * copies
    if sampling is not None:
        sampling = Sampling(
            jnp.repeat(sampling.temperature, copies),
            (sampling.seed[:, None] * copies + jnp.arange(copies)).reshape(-1),
        )

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BV, found, done_B, progress = loop
        logits_BV = apply(allowed, logits_BV, progress)
        log_probability_BV = jax.nn.log_softmax(logits_BV)
        token_B = jnp.where(done_B, rules.end, choose(logits_BV, progress.index, sampling))
        gain_B = jnp.take_along_axis(log_probability_BV, token_B[:, None], axis=-1)[:, 0]
        ended_B = done_B | (token_B == rules.end)
        found = found._replace(
            tokens=found.tokens.at[:, progress.index].set(token_B),
            lengths=found.lengths + ~ended_B,
            log_probability=found.log_probability + jnp.where(done_B, 0, gain_B),
        )
        done_B = ended_B | (cache.length >= spec.dims.text_positions)  # the context is full
        hidden_B1D, cache = decoder.step(token_B[:, None], cache)
        progress = advance(progress, token_B, rules)
        return _Loop(cache, project(hidden_B1D)[:, 0], found, done_B, progress)

    nothing = SearchResult(
        tokens=jnp.full((batch, max_tokens), rules.end, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        log_probability=jnp.zeros(batch, jnp.float32),
        no_speech=jnp.repeat(no_speech_B, copies),
    )
    first_BV = jnp.repeat(logits_B2V[:, 1], copies, axis=0)
    progress = begin(batch, max_tokens if rules.look_back else 0)
    start = _Loop(cache, first_BV, nothing, jnp.repeat(~active_B, copies), progress)
    return best(jax.lax.while_loop(more, write, start).found, copies, length_penalty)


def choose(
    logits_BV: Float[Array, "B V"], index: Int[Array, ""], sampling: Sampling | None
) -> Int[Array, " B"]:
    """The next token of each row: the most probable one, or one drawn."""
    likeliest_B = likeliest(logits_BV)
    if sampling is None:
        return likeliest_B

    def draw(logits_V: Array, temperature: Array, seed: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))

    drawn_B = jax.vmap(draw)(logits_BV, *sampling)
    return jnp.where(sampling.temperature > 0, drawn_B, likeliest_B)


def likeliest(logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """`argmax`: the first of the largest.

    XLA's own compares one number after the other on CPUs; the maximum and the first place that
    equals it are found many numbers at a time, ten times as fast (docs/LOG.md).
    """

    def in_two(logits: Array) -> Array:
        last = logits.shape[-1] - 1
        equal = logits == logits.max(axis=-1, keepdims=True)
        return jnp.where(equal, jnp.arange(last + 1, dtype=jnp.int32), last).min(axis=-1)

    at_once = lambda logits: logits.argmax(axis=-1).astype(jnp.int32)
    return jax.lax.platform_dependent(logits, cpu=in_two, default=at_once)


def score(
    log_probability: Float[Array, "..."], lengths: Int[Array, "..."], penalty: float | None
) -> Float[Array, "..."]:
    """What openai-whisper ranks texts by: the mean, or Wu et al.'s penalty (arXiv 1609.08144)."""
    if penalty is None:
        return log_probability / jnp.maximum(lengths, 1)
    return log_probability / ((5 + lengths) / 6) ** penalty


def best(found: SearchResult, copies: int, length_penalty: float | None) -> SearchResult:
    """The best of every `copies` rows."""
    if copies == 1:
        return found
    scores = score(found.log_probability, found.lengths, length_penalty).reshape(-1, copies)
    rows_B = jnp.arange(len(scores)) * copies + scores.argmax(axis=1)
    return jax.tree.map(lambda leaf: leaf[rows_B], found)
