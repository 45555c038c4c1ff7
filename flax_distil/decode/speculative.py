"""Speculative decoding (paper section 3.3, Leviathan et al. 2023): a drafter proposes some tokens,
the model verifies them in one pass, and every row of the batch keeps those that are accepted.

A step of the decoder mostly costs reading its weights and the audio's keys and values, for one
token as for five. The text is the model's own: token for token that of greedy search, or a sample
of its distribution.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_distil.decode import search
from flax_distil.decode.drafters import DraftedText, Drafter, Drafts, row_keys
from flax_distil.decode.rules import RuleSet, TextProgress
from flax_distil.decode.search import Acceptance, DecoderModel, Sampling, SearchInput, SearchResult
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip


class _Loop(NamedTuple):
    cache: Cache  # the model's: all but the newest token of each row
    memory: Any  # the drafter's
    text: DraftedText
    log_probability_B: Array
    done_B: Array
    acceptance: Acceptance


class Verified(NamedTuple):
    """The model's next tokens: `accepted` draft tokens, then one of its own.

    gains: log-probabilities of the tokens. progress: the state before each of them.
    """

    tokens_BK: Int[Array, "B K"]
    gains_BK: Float[Array, "B K"]
    accepted_B: Int[Array, " B"]
    progress: TextProgress


@by_clip(static=("rules", "max_tokens", "draft_tokens"), whole=("model", "drafter"))
def speculative(
    model: DecoderModel,
    batch: SearchInput,
    *,
    drafter: Drafter,
    draft_audio_BSE: Float[Array, "B S E"],
    draft_tokens: int,
    rules: RuleSet,
    max_tokens: int,
) -> SearchResult:
    """The result of `greedy` in fewer passes of the model; with `batch.sampling`, a draw from it.

    draft_audio_BSE: audio states for the drafter. draft_tokens: drafted a pass, at least one.
    """
    decoder, prompt, sampling = model.decoder(), batch.prompt, batch.sampling
    project, room = decoder.projection(model.head_DV), max_tokens + draft_tokens + 1

    def write(loop: _Loop) -> _Loop:
        drafts, memory = drafter.propose(loop.memory, loop.text, draft_tokens, rules, sampling)
        read_BK = jnp.concatenate([loop.text.newest(1), drafts.tokens], axis=1)
        hidden_BKD, cache = decoder.step(read_BK, loop.cache)
        logits_BKV, progress = project(hidden_BKD), loop.text.progress
        verified = verify(logits_BKV, progress, drafts, rules, sampling)
        return _keep(loop._replace(cache=cache, memory=memory), verified, rules, limit_B)

    # The first token comes from the prompt's own pass, with no drafts to verify.
    hidden_B2D, cache = search.prefill(decoder, batch.audio_BSD, prompt, room)
    logits_B2V = project(hidden_B2D)
    rows = len(batch.active_B)
    zeros_B = jnp.zeros(rows, jnp.int32)
    start_B = zeros_B + prompt.length
    loop = _Loop(
        cache=cache,
        memory=drafter.start(draft_audio_BSE, prompt, room),
        text=DraftedText(
            tokens=jnp.pad(prompt.tokens, ((0, 0), (0, room))),
            length=start_B,
            progress=rules.start(rows, max_tokens)._replace(index=zeros_B),
        ),
        log_probability_B=jnp.zeros(rows),
        done_B=~batch.active_B,
        acceptance=Acceptance(*[zeros_B] * len(Acceptance._fields)),
    )
    limit_B = jnp.minimum(max_tokens, model.spec.dims.text_positions + 1 - start_B)
    no_drafts = Drafts(jnp.zeros((rows, 0), jnp.int32), None)
    verified = verify(logits_B2V[:, 1:], loop.text.progress, no_drafts, rules, sampling)
    loop = _keep(loop, verified, rules, limit_B)
    loop = jax.lax.while_loop(lambda loop: ~loop.done_B.all(), write, loop)

    place_1L = jnp.arange(max_tokens)[None]
    tokens_BL = jnp.take_along_axis(loop.text.tokens, place_1L + start_B[:, None], axis=1)
    tokens_BL = jnp.where(place_1L < loop.acceptance.written[:, None], tokens_BL, rules.end)
    return SearchResult(
        tokens=tokens_BL,
        lengths=(tokens_BL != rules.end).sum(axis=1),
        log_probability=loop.log_probability_B,
        no_speech=jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech],
        acceptance=loop.acceptance,
    )


def verify(
    logits_BKV: Float[Array, "B K V"],
    progress: TextProgress,
    drafts: Drafts,
    rules: RuleSet,
    sampling: Sampling | None = None,
) -> Verified:
    """Accepts the draft tokens from the left, as long as they are what the model would write.

    logits_BKV: the model's, before the first draft token and after each of the K - 1.
    """
    count, vocab = logits_BKV.shape[1:]
    steps = [progress]
    for index in range(count - 1):
        steps.append(rules.advance(steps[-1], drafts.tokens[:, index]))
    every = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *steps)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every)
    ruled_RV = rules.apply(logits_BKV.reshape(-1, vocab), flat)
    logits_BKV = ruled_RV.reshape(logits_BKV.shape)
    if sampling is None:
        own_BK = search.likeliest(logits_BKV)
        accepted_B = _leading(own_BK[:, :-1] == drafts.tokens)
    else:
        own_B1, accepted_B = _reject(logits_BKV, progress, drafts, sampling)
        own_BK = jnp.broadcast_to(own_B1, logits_BKV.shape[:2])
    drafted_BK = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    tokens_BK = jnp.where(jnp.arange(count)[None] < accepted_B[:, None], drafted_BK, own_BK)
    gains_BK1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BKV), tokens_BK[..., None], axis=-1)
    return Verified(tokens_BK, gains_BK1[..., 0], accepted_B, every)


def _leading(right_BK: Array) -> Array:
    """[B], how many are True before the first False."""
    return jnp.cumprod(right_BK, axis=1).sum(axis=1)


def _reject(
    logits_BKV: Array, progress: TextProgress, drafts: Drafts, sampling: Sampling
) -> tuple[Array, Array]:
    """Rejection sampling: the model's own token [B 1] after the accepted ones, and their number.

    A draft token d out of q is accepted with probability min(1, p(d) / q(d)); one that is rejected
    is replaced by a draw from max(p - q, 0). The text is then distributed as p, whatever q is.
    """
    p_BKV = jax.nn.softmax(search.at_temperature(logits_BKV, sampling))
    count, vocab = drafts.tokens.shape[1], p_BKV.shape[-1]
    if drafts.log_probability is None:
        q_BKV = jax.nn.one_hot(drafts.tokens, vocab)
    else:
        q_BKV = jnp.exp(drafts.log_probability)
    pick = lambda x_BKV: jnp.take_along_axis(x_BKV, drafts.tokens[..., None], axis=-1)[..., 0]
    uniform = lambda key: jax.random.uniform(key, (count,))
    chance_BK = jax.vmap(uniform)(row_keys(sampling, progress, 1))
    accepted_B = _leading(chance_BK * pick(q_BKV) < pick(p_BKV[:, :-1]))
    q_BKV = jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0)))
    here = lambda x_BKV: jnp.take_along_axis(x_BKV, accepted_B[:, None, None], axis=1)[:, 0]
    p_BV = here(p_BKV)
    rest_BV = jnp.maximum(p_BV - here(q_BKV), 0)
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    return search.draw_tokens(jnp.log(rest_BV), row_keys(sampling, progress, 0))[
        :, None
    ], accepted_B


def _keep(loop: _Loop, verified: Verified, rules: RuleSet, limit_B: Array) -> _Loop:
    """Each row takes its tokens, up to the first end of text and its limit.

    Rejected tokens stay in the caches, beyond the length, until the next ones replace them.
    """
    text, acceptance, count = loop.text, loop.acceptance, verified.tokens_BK.shape[1]
    ends_BK = verified.tokens_BK == rules.end
    until_end_B = jnp.where(ends_BK.any(axis=1), ends_BK.argmax(axis=1) + 1, count)
    kept_B = jnp.minimum(verified.accepted_B + 1, until_end_B)
    kept_B = jnp.where(loop.done_B, 0, jnp.minimum(kept_B, limit_B - acceptance.written))
    last_B = jnp.maximum(kept_B - 1, 0)
    like = lambda one_B, leaf: jnp.expand_dims(one_B, tuple(range(1, leaf.ndim)))
    pick = lambda leaf: jnp.take_along_axis(leaf, like(last_B, leaf), axis=1)[:, 0]
    token_B = pick(verified.tokens_BK)
    advanced = rules.advance(jax.tree.map(pick, verified.progress), token_B)
    on_B = kept_B > 0
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    text = DraftedText(
        tokens=jax.vmap(write)(text.tokens, verified.tokens_BK, text.length),
        length=text.length + kept_B,
        progress=jax.tree.map(
            lambda new, old: jnp.where(like(on_B, new), new, old), advanced, text.progress
        ),
    )
    gains_BK = jnp.where(jnp.arange(count)[None] < kept_B[:, None], verified.gains_BK, 0)
    acceptance = Acceptance(
        passes=acceptance.passes + ~loop.done_B,
        drafted=acceptance.drafted + jnp.where(loop.done_B, 0, count - 1),
        accepted=acceptance.accepted + jnp.minimum(verified.accepted_B, kept_B),
        written=acceptance.written + kept_B,
    )
    return loop._replace(
        cache=loop.cache._replace(length=text.length - 1),
        text=text,
        log_probability_B=loop.log_probability_B + gains_BK.sum(axis=1),
        done_B=loop.done_B | (on_B & (token_B == rules.end)) | (acceptance.written >= limit_B),
        acceptance=acceptance,
    )
