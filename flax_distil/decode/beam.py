"""openai-whisper's beam search: one compiled loop, static shapes throughout.

K beams follow each of B clips; their self-attention caches are rows of one array, reordered after
every token, and all beams of a clip share its cross-attention. At each step 2 K continuations of a
clip are ranked and the best K that do not end are kept. Each continuation that ends and outranks
the K-th that does not is collected, until beams x patience texts have ended; they are ranked by
their mean log-probability, the end of text not counted in the length (`text_score`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_distil.decode import search
from flax_distil.decode.rules import RuleSet, TextProgress
from flax_distil.decode.search import DecoderModel, SearchInput, SearchResult
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip

NEVER = -1e9  # worse than any text


class _Texts(NamedTuple):
    """Some texts of each clip. sums: of log-probabilities; `NEVER` is an empty place."""

    tokens: Array  # [B K L]
    lengths: Array  # [B K]
    sums: Array  # [B K]


class _Loop(NamedTuple):
    cache: Cache
    logits_BKV: Array
    beams: _Texts  # best first
    ended: _Texts
    done_B: Array
    progress: TextProgress  # rows are beams


@by_clip(static=("rules", "max_tokens", "beams", "collected", "length_penalty"), whole=("model",))
def beam(
    model: DecoderModel,
    batch: SearchInput,
    *,
    rules: RuleSet,
    max_tokens: int,
    beams: int,
    collected: int,
    length_penalty: float | None = None,
) -> SearchResult:
    """The best text of each clip among `beams` followed at once.

    collected: texts that end before the search stops. length_penalty: as of `text_score`.
    """
    decoder, clips = model.decoder(), len(batch.active_B)
    project = decoder.projection(model.head_DV)
    hidden_B2D, cache = search.prefill(decoder, batch.audio_BSD, batch.prompt, max_tokens)
    logits_B2V = project(hidden_B2D)

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BKV, going, ended, done_B, progress = loop
        at = progress.index
        full_B = jnp.broadcast_to(cache.length >= model.spec.dims.text_positions, clips * beams)
        last_B = full_B[::beams] | (at + 1 >= max_tokens)
        logits_RV = rules.apply(logits_BKV.reshape(-1, logits_BKV.shape[-1]), progress)
        gain_BKV = jax.nn.log_softmax(logits_RV).reshape(logits_BKV.shape)
        parent_BC, token_BC, longer = continuations(gain_BKV, going, at, 2 * beams)
        ends_BC = token_BC == rules.end
        new_BC = ends_BC & (jnp.cumsum(~ends_BC, axis=1) < beams) & ~done_B[:, None]
        ended = collect(ended, longer, new_BC)
        order_BK = jnp.argsort(ends_BC, axis=1, stable=True)[:, :beams]
        parent_BK, token_BK, longer = _pick((parent_BC, token_BC, longer), order_BK)
        going = jax.tree.map(partial(jax.vmap(jnp.where), done_B), going, longer)
        done_B |= last_B | (ended.sums > NEVER / 2).all(axis=1)

        rows = (parent_BK + beams * jnp.arange(clips)[:, None]).reshape(-1)
        own = cache.rows(partial(jnp.take, indices=rows))
        progress = jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, progress)
        token_R = token_BK.reshape(-1)
        hidden_R1D, cache = decoder.step(token_R[:, None], cache._replace(own=own))
        logits_BKV = project(hidden_R1D).reshape(logits_BKV.shape)
        return _Loop(cache, logits_BKV, going, ended, done_B, rules.advance(progress, token_R))

    going = _empty(clips, beams, max_tokens, rules.end)
    start = _Loop(
        search.repeat_cache(cache, beams),
        jnp.repeat(logits_B2V[:, 1:], beams, axis=1),
        going._replace(sums=going.sums.at[:, 0].set(0)),  # at first all beams are one
        _empty(clips, collected, max_tokens, rules.end),
        ~batch.active_B,
        rules.start(clips * beams, max_tokens),
    )
    loop = jax.lax.while_loop(more, write, start)
    text, ended_B = best_text(loop.beams, loop.ended, length_penalty)
    no_speech = jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech]
    return SearchResult(text.tokens, text.lengths, text.sums, no_speech, ended_B)


def continuations(
    gain_BKV: Float[Array, "B K V"], going: _Texts, at: Int[Array, ""], count: int
) -> tuple[Int[Array, "B C"], Int[Array, "B C"], _Texts]:
    """The best `count` texts that are one token longer: their beams, tokens, and themselves.

    gain_BKV: log-probabilities of the next token. at: its position.
    """
    vocabulary = gain_BKV.shape[-1]
    # Two small rankings instead of one over all beams' vocabularies.
    few = min(count, vocabulary)
    gain_BKC, token_BKC = jax.lax.top_k(gain_BKV, few)
    sums_BN = (going.sums[..., None] + gain_BKC).reshape(len(gain_BKV), -1)
    sums_BC, place_BC = jax.lax.top_k(sums_BN, count)
    parent_BC = place_BC // few
    token_BC = jnp.take_along_axis(token_BKC.reshape(sums_BN.shape), place_BC, axis=1)
    tokens_BCL = jnp.take_along_axis(going.tokens, parent_BC[..., None], axis=1)
    tokens_BCL = tokens_BCL.at[:, :, at].set(token_BC)
    return parent_BC, token_BC, _Texts(tokens_BCL, jnp.full_like(parent_BC, at + 1), sums_BC)


def collect(ended: _Texts, longer: _Texts, new_BC: Bool[Array, "B C"]) -> _Texts:
    """The ended texts and those of `longer` that end now, first come first served."""
    fresh = longer._replace(
        lengths=longer.lengths - 1,  # the end is not a token of the text
        sums=jnp.where(new_BC, longer.sums, NEVER),
    )
    merged = _concatenate(ended, fresh)
    order_BC = jnp.argsort(merged.sums < NEVER / 2, axis=1, stable=True)
    return _pick(merged, order_BC[:, : ended.sums.shape[1]])


def best_text(
    going: _Texts, ended: _Texts, length_penalty: float | None
) -> tuple[_Texts, Bool[Array, " B"]]:
    """The best text of each clip, and whether it ended; where fewer texts than beams have ended,
    the best beams compete as well."""
    valid_BC = ended.sums > NEVER / 2
    beams, collected = going.sums.shape[1], ended.sums.shape[1]
    valid_BK = jnp.arange(beams)[None] < beams - valid_BC.sum(axis=1, keepdims=True)
    texts, valid = _concatenate(ended, going), jnp.concatenate([valid_BC, valid_BK], axis=1)
    scores = search.text_score(texts.sums, texts.lengths, length_penalty)
    best_B = jnp.where(valid, scores, -jnp.inf).argmax(axis=1)
    best = jax.tree.map(lambda leaf: leaf[:, 0], _pick(texts, best_B[:, None]))
    return best, best_B < collected


def _concatenate(first: _Texts, second: _Texts) -> _Texts:
    return jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), first, second)


def _pick(texts: Any, places_BK: Array) -> Any:
    rows_B1 = jnp.arange(len(places_BK))[:, None]
    return jax.tree.map(lambda leaf: leaf[rows_B1, places_BK], texts)


def _empty(clips: int, places: int, room: int, end: int) -> _Texts:
    return _Texts(
        tokens=jnp.full((clips, places, room), end, jnp.int32),
        lengths=jnp.zeros((clips, places), jnp.int32),
        sums=jnp.full((clips, places), NEVER),
    )
