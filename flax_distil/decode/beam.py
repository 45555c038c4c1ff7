"""openai-whisper's beam search: one compiled loop, static shapes throughout.

K beams follow each of B clips; their self-attention caches are rows of one array, reordered after
every token, and all beams of a clip share its cross-attention. At each step 2 K continuations of a
clip are ranked and the best K that do not end are kept. Each continuation that ends and outranks
the K-th that does not is collected, until beams x patience texts have ended; they are ranked by
their mean log-probability, the end of text not counted in the length (`text_score`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_distil.decode.rules import RuleSet, TextProgress, advance, apply_rules, start_progress
from flax_distil.decode.search import (
    DecoderModel,
    SearchInput,
    SearchResult,
    prefill,
    repeat_cache,
    text_score,
)
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip

NEVER = -1e9  # worse than any text


class _Texts(NamedTuple):
    """Some texts of each clip. priority: orders the ended ones; `NEVER` is an empty place.

    whole: whether the model ended the text; False where it goes on or was cut.
    """

    tokens: Array  # [B K L]
    lengths: Array  # [B K]
    sums: Array  # [B K]
    priority: Array  # [B K]
    whole: Array  # [B K]


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
    decoder = model.decoder()
    project, allowed = decoder.projection(model.head_DV), rules.rules()
    clips = len(batch.active_B)
    hidden_B2D, cache = prefill(decoder, batch.audio_BSD, batch.prompt, max_tokens)
    logits_B2V = project(hidden_B2D)

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BKV, going, ended, done_B, progress = loop
        at = progress.index
        full_B = jnp.broadcast_to(cache.length >= model.spec.dims.text_positions, clips * beams)
        last_B = full_B[::beams] | (at + 1 >= max_tokens)
        logits_RV = apply_rules(allowed, logits_BKV.reshape(-1, logits_BKV.shape[-1]), progress)
        gain_BKV = jax.nn.log_softmax(logits_RV).reshape(logits_BKV.shape)
        parent_BC, token_BC, longer = continuations(gain_BKV, going, at, 2 * beams)
        ends_BC = token_BC == rules.end
        ended = collect(ended, longer, ends_BC, done_B, at, beams)
        order_BK = jnp.argsort(ends_BC, axis=1, stable=True)[:, :beams]
        pick = partial(jnp.take_along_axis, indices=order_BK, axis=1)
        parent_BK, token_BK = pick(parent_BC), pick(token_BC)
        going = jax.tree.map(partial(freeze, done_B), going, _pick(longer, order_BK))
        done_B |= last_B | (ended.priority > NEVER / 2).all(axis=1)

        rows = (parent_BK + beams * jnp.arange(clips)[:, None]).reshape(-1)
        own = cache.rows(partial(jnp.take, indices=rows))
        progress = jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, progress)
        token_R = token_BK.reshape(-1)
        hidden_R1D, cache = decoder.step(token_R[:, None], cache._replace(own=own))
        logits_BKV = project(hidden_R1D).reshape(logits_BKV.shape)
        return _Loop(cache, logits_BKV, going, ended, done_B, advance(progress, token_R, rules))

    first_BKV = jnp.repeat(logits_B2V[:, 1:], beams, axis=1)
    going = _empty(clips, beams, max_tokens, rules.end)
    # At first all beams are one.
    going = going._replace(sums=going.sums.at[:, 1:].set(NEVER))
    ended = _empty(clips, collected, max_tokens, rules.end)
    progress = start_progress(clips * beams, max_tokens if rules.look_back else 0)
    cache = repeat_cache(cache, beams)
    start = _Loop(cache, first_BKV, going, ended, ~batch.active_B, progress)
    loop = jax.lax.while_loop(more, write, start)
    text = best_text(loop.beams, loop.ended, beams, length_penalty)
    no_speech = jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech]
    return SearchResult(text.tokens, text.lengths, text.sums, no_speech, text.whole)


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
    lengths_BC = jnp.full(parent_BC.shape, at + 1, jnp.int32)
    no_BC = jnp.zeros(parent_BC.shape, bool)
    longer = _Texts(tokens_BCL, lengths_BC, sums_BC, jnp.zeros_like(sums_BC), no_BC)
    return parent_BC, token_BC, longer


def collect(
    ended: _Texts,
    longer: _Texts,
    ends_BC: Bool[Array, "B C"],
    done_B: Bool[Array, " B"],
    at: Int[Array, ""],
    beams: int,
) -> _Texts:
    """The ended texts and those that end now, first come first served."""
    rank = jnp.arange(ends_BC.shape[1])
    going_before_BC = jnp.cumsum(~ends_BC, axis=1)
    new_BC = ends_BC & (going_before_BC < beams) & ~done_B[:, None] & (longer.sums > NEVER / 2)
    arrival_C = -(at * len(rank) + rank).astype(jnp.float32)
    fresh = longer._replace(
        lengths=longer.lengths - ends_BC,  # the end is not a token of the text
        priority=jnp.where(new_BC, arrival_C, NEVER),
        whole=ends_BC,
    )
    merged = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), ended, fresh)
    return _pick(merged, jax.lax.top_k(merged.priority, ended.priority.shape[1])[1])


def best_text(going: _Texts, ended: _Texts, beams: int, length_penalty: float | None) -> _Texts:
    """The best text of each clip; where too few have ended, the best beams compete as well."""
    valid_BC = ended.priority > NEVER / 2
    missing_B1 = beams - valid_BC.sum(axis=1, keepdims=True)
    valid_BK = jnp.arange(beams) < missing_B1
    texts = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), ended, going)
    scores = text_score(texts.sums, texts.lengths, length_penalty)
    valid = jnp.concatenate([valid_BC, valid_BK], axis=1)
    best_B = jnp.where(valid, scores, -jnp.inf).argmax(axis=1)
    return jax.tree.map(lambda leaf: leaf[:, 0], _pick(texts, best_B[:, None]))


def freeze(done_B: Bool[Array, " B"], before: Array, after: Array) -> Array:
    """`after`, but `before` for clips that are done."""
    return jnp.where(done_B.reshape(-1, *[1] * (after.ndim - 1)), before, after)


def _pick(texts: _Texts, places_BK: Array) -> _Texts:
    rows_B1 = jnp.arange(len(places_BK))[:, None]
    return _Texts(*(leaf[rows_B1, places_BK] for leaf in texts))


def _empty(clips: int, places: int, room: int, end: int) -> _Texts:
    zeros = jnp.zeros((clips, places))
    return _Texts(
        tokens=jnp.full((clips, places, room), end, jnp.int32),
        lengths=jnp.zeros((clips, places), jnp.int32),
        sums=zeros,
        priority=zeros + NEVER,
        whole=jnp.zeros((clips, places), bool),
    )
