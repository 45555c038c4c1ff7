"""Beam search, openai-whisper's and Transformers': one compiled loop, static shapes throughout.

K beams follow each of B clips; their self-attention caches are rows of one array, reordered after
every token, and all beams of a clip share its cross-attention. Both programs rank 2 K continuations
of a clip at each step and keep the best K that go on. They differ in which ended texts they collect
and in when they stop:

- openai-whisper collects every end that outranks the K-th text going on, first come first served,
  until beams x patience have ended. It ranks them by the mean log-probability, end excluded from
  the count (`score`).
- Transformers collects ends among the best K continuations, keeps the K best of them by
  sum / length ** penalty, and stops when the best text going on could no longer be kept. Its
  log-probabilities are those before suppression.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_distil.decode.greedy import Prompt, SearchResult, multiply, prefill, score
from flax_distil.decode.rules import Progress, RuleSet, advance, apply, begin
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip

NEVER = -1e9  # worse than any text


@dataclass(frozen=True)
class BeamSearch:
    """The static description of a search."""

    beams: int
    collected: int  # texts that end before it stops
    length_penalty: float | None
    as_transformers: bool

    @property
    def penalty(self) -> float:
        """Transformers' exponent of the length."""
        return 1.0 if self.length_penalty is None else self.length_penalty


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
    going: _Texts  # the beams, best first
    ended: _Texts
    done_B: Array
    progress: Progress  # rows are beams


@by_clip(static=("spec", "rules", "max_tokens", "search"))
def beam(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    prompt: Prompt,
    active_B: Bool[Array, " B"],
    rules: RuleSet,
    max_tokens: int,
    search: BeamSearch,
    head_DV: Float[Array, "D V"] | None = None,
) -> SearchResult:
    """The best text that a beam search finds; the arguments are those of `greedy`."""
    decoder = spec.decoder(params)
    project, allowed = decoder.projection(head_DV), rules.rules()
    batch, beams = prompt.tokens.shape[0], search.beams
    hidden_B2D, cache = prefill(decoder, audio_BSD, prompt, max_tokens)
    logits_B2V = project(hidden_B2D)

    def more(loop: _Loop) -> Array:
        return (loop.progress.index < max_tokens) & ~loop.done_B.all()

    def write(loop: _Loop) -> _Loop:
        cache, logits_BKV, going, ended, done_B, progress = loop
        at = progress.index
        full_B = jnp.broadcast_to(cache.length >= spec.dims.text_positions, batch * beams)
        last_B = full_B[::beams] | (at + 1 >= max_tokens)
        gain_BKV = gains(logits_BKV, partial(apply, allowed), progress, search.as_transformers)
        parent_BC, token_BC, next = continuations(gain_BKV, going, at, 2 * beams)
        ends_BC = token_BC == rules.end
        ended = collect(ended, next, ends_BC, last_B, done_B, at, search)
        order_BK = jnp.argsort(ends_BC, axis=1, stable=True)[:, :beams]
        pick = partial(jnp.take_along_axis, indices=order_BK, axis=1)
        parent_BK, token_BK = pick(parent_BC), pick(token_BC)
        going = jax.tree.map(partial(freeze, done_B), going, _pick(next, order_BK))
        done_B |= last_B | finished(ended, going, at, search)

        rows = (parent_BK + beams * jnp.arange(batch)[:, None]).reshape(-1)
        own = cache.rows(partial(jnp.take, indices=rows))
        progress = jax.tree.map(lambda leaf: leaf[rows] if leaf.ndim else leaf, progress)
        token_R = token_BK.reshape(-1)
        hidden_R1D, cache = decoder.step(token_R[:, None], cache._replace(own=own))
        logits_BKV = project(hidden_R1D).reshape(logits_BKV.shape)
        return _Loop(cache, logits_BKV, going, ended, done_B, advance(progress, token_R, rules))

    first_BKV = jnp.repeat(logits_B2V[:, 1:], beams, axis=1)
    going = _nothing(batch, beams, max_tokens, rules.end)
    # At first all beams are one.
    going = going._replace(sums=going.sums.at[:, 1:].set(NEVER))
    ended = _nothing(batch, search.collected, max_tokens, rules.end)
    progress = begin(batch * beams, max_tokens if rules.look_back else 0)
    start = _Loop(multiply(cache, beams), first_BKV, going, ended, ~active_B, progress)
    loop = jax.lax.while_loop(more, write, start)
    text = choose(loop.going, loop.ended, search)
    no_speech = jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech]
    return SearchResult(text.tokens, text.lengths, text.sums, no_speech, text.whole)


def gains(logits_BKV: Array, allow, progress: Progress, as_transformers: bool) -> Array:
    """Log-probabilities of the next token, what is not allowed at -inf."""
    logits_RV = logits_BKV.reshape(-1, logits_BKV.shape[-1])
    if as_transformers:
        gain_RV = allow(jax.nn.log_softmax(logits_RV), progress)
    else:
        gain_RV = jax.nn.log_softmax(allow(logits_RV, progress))
    return gain_RV.reshape(logits_BKV.shape)


def continuations(
    gain_BKV: Array, going: _Texts, at: Array, count: int
) -> tuple[Array, Array, _Texts]:
    """The best `count` texts that are one token longer: their beams, tokens, and themselves."""
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
    next: _Texts,
    ends_BC: Array,
    last_B: Array,
    done_B: Array,
    at: Array,
    search: BeamSearch,
) -> _Texts:
    """The ended texts, with those that end now."""
    count = ends_BC.shape[1]
    rank = jnp.arange(count)
    if search.as_transformers:
        new_BC = (ends_BC | last_B[:, None]) & (rank < search.beams)
        priority_BC = next.sums / (at + 1) ** search.penalty
    else:
        going_before_BC = jnp.cumsum(~ends_BC, axis=1)
        new_BC = ends_BC & (going_before_BC < search.beams)
        priority_BC = -(at * count + rank).astype(jnp.float32)  # the order of arrival
    new_BC = new_BC & ~done_B[:, None] & (next.sums > NEVER / 2)
    # The end is no token of the text; one that was cut off has none.
    fresh = next._replace(
        lengths=next.lengths - ends_BC,
        priority=jnp.where(new_BC, priority_BC, NEVER),
        whole=ends_BC,
    )
    merged = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), ended, fresh)
    return _pick(merged, jax.lax.top_k(merged.priority, search.collected)[1])


def finished(ended: _Texts, going: _Texts, at: Array, search: BeamSearch) -> Array:
    """Which clips need no more tokens."""
    full_B = (ended.priority > NEVER / 2).all(axis=1)
    if not search.as_transformers:
        return full_B
    hope_B = going.sums[:, 0] / (at + 1) ** search.penalty
    return full_B & (hope_B <= ended.priority.min(axis=1))


def choose(going: _Texts, ended: _Texts, search: BeamSearch) -> _Texts:
    """The best text of each clip."""
    if search.as_transformers:
        best_B = ended.priority.argmax(axis=1)
        texts = ended
    else:
        # Where too few have ended, the best beams are taken as they are.
        valid_BC = ended.priority > NEVER / 2
        missing_B1 = search.beams - valid_BC.sum(axis=1, keepdims=True)
        valid_BK = jnp.arange(search.beams) < missing_B1
        texts = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), ended, going)
        scores = score(texts.sums, texts.lengths, search.length_penalty)
        valid = jnp.concatenate([valid_BC, valid_BK], axis=1)
        best_B = jnp.where(valid, scores, -jnp.inf).argmax(axis=1)
    return jax.tree.map(lambda leaf: leaf[:, 0], _pick(texts, best_B[:, None]))


def freeze(done_B: Array, before: Array, after: Array) -> Array:
    """`after`, but `before` for clips that are done."""
    return jnp.where(done_B.reshape(-1, *[1] * (after.ndim - 1)), before, after)


def _pick(texts: _Texts, places_BK: Array) -> _Texts:
    rows_B1 = jnp.arange(len(places_BK))[:, None]
    return _Texts(*(leaf[rows_B1, places_BK] for leaf in texts))


def _nothing(batch: int, places: int, room: int, end: int) -> _Texts:
    zeros = jnp.zeros((batch, places))
    return _Texts(
        tokens=jnp.full((batch, places, room), end, jnp.int32),
        lengths=jnp.zeros((batch, places), jnp.int32),
        sums=zeros,
        priority=zeros + NEVER,
        whole=jnp.zeros((batch, places), bool),
    )
