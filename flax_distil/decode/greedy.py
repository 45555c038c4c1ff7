"""Greedy search and sampling: one compiled loop over a static cache, on the device throughout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_distil.decode import search
from flax_distil.decode.rules import RuleSet, TextProgress
from flax_distil.decode.search import DecoderModel, Sampling, SearchInput, SearchResult
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip


class _Loop(NamedTuple):
    cache: Cache
    logits_BV: Array
    result: SearchResult
    done_B: Array
    progress: TextProgress


@by_clip(static=("rules", "max_tokens", "copies", "length_penalty"), whole=("model",))
def greedy(
    model: DecoderModel,
    batch: SearchInput,
    *,
    rules: RuleSet,
    max_tokens: int,
    copies: int = 1,
    length_penalty: float | None = None,
) -> SearchResult:
    """Takes the most probable next token until every row has ended or has `max_tokens`.

    copies: texts drawn for each row where `batch.sampling` is given; the best one is returned.
    length_penalty: how the best one is chosen (`text_score`).
    """
    decoder, sampling = model.decoder(), batch.sampling
    project = decoder.projection(model.head_DV)
    hidden_B2D, cache = search.prefill(decoder, batch.audio_BSD, batch.prompt, max_tokens)
    logits_B2V = project(hidden_B2D)
    no_speech_B = jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech]
    rows = len(batch.active_B) * copies
    if sampling is not None:
        seed_BC = sampling.seed[:, None] * copies + jnp.arange(copies)[None]
        sampling = Sampling(jnp.repeat(sampling.temperature, copies), seed_BC.reshape(-1))

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BV, result, done_B, progress = loop
        logits_BV = rules.apply(logits_BV, progress)
        log_probability_BV = jax.nn.log_softmax(logits_BV)
        token_B = jnp.where(done_B, rules.end, next_token(logits_BV, progress.index, sampling))
        gain_B = jnp.take_along_axis(log_probability_BV, token_B[:, None], axis=-1)[:, 0]
        ended_B = done_B | (token_B == rules.end)
        result = result._replace(
            tokens=result.tokens.at[:, progress.index].set(token_B),
            lengths=result.lengths + ~ended_B,
            log_probability=result.log_probability + jnp.where(done_B, 0, gain_B),
        )
        done_B = ended_B | (cache.length >= model.spec.dims.text_positions)  # the context is full
        hidden_B1D, cache = decoder.step(token_B[:, None], cache)
        progress = rules.advance(progress, token_B)
        return _Loop(cache, project(hidden_B1D)[:, 0], result, done_B, progress)

    empty = SearchResult(
        tokens=jnp.full((rows, max_tokens), rules.end, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        log_probability=jnp.zeros(rows, jnp.float32),
        no_speech=jnp.repeat(no_speech_B, copies),
    )
    start = _Loop(
        search.repeat_cache(cache, copies),
        jnp.repeat(logits_B2V[:, 1], copies, axis=0),
        empty,
        jnp.repeat(~batch.active_B, copies),
        rules.start(rows, max_tokens),
    )
    result = jax.lax.while_loop(more, write, start).result
    return result if copies == 1 else best_copy(result, copies, length_penalty)


def next_token(
    logits_BV: Float[Array, "B V"], index: Int[Array, ""], sampling: Sampling | None
) -> Int[Array, " B"]:
    """The next token of each row: the most probable one, or one drawn."""
    likeliest_B = search.likeliest(logits_BV)
    if sampling is None:
        return likeliest_B
    key = lambda seed: jax.random.fold_in(jax.random.key(seed), index)
    scores_BV = search.at_temperature(logits_BV, sampling)
    drawn_B = search.draw_tokens(scores_BV, jax.vmap(key)(sampling.seed))
    return jnp.where(sampling.temperature > 0, drawn_B, likeliest_B)


def best_copy(result: SearchResult, copies: int, length_penalty: float | None) -> SearchResult:
    """The best of every `copies` rows."""
    scores_R = search.text_score(result.log_probability, result.lengths, length_penalty)
    best_B = scores_R.reshape(-1, copies).argmax(axis=1)
    rows_B = jnp.arange(len(best_B)) * copies + best_B
    return jax.tree.map(lambda leaf: leaf[rows_B], result)
