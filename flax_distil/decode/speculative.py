"""Speculative decoding (paper section 3.3, Leviathan et al. 2023): a drafter guesses some tokens,
the teacher verifies them in one pass, and every row of the batch keeps what it may.

A step of the decoder costs the reading of its weights and of the audio's keys and values, for one
token as for five. What is written is the teacher's: token for token its greedy text, or a sample of
its distribution.

Where guesses are poor they cost more than they save. Each row keeps the balance of guesses accepted
and guesses that a pass must yield to pay (`break_even`); in debt it writes alone, a token a pass.
A text stays the teacher's: greedy search writes the same with and without guesses, and in sampling
a row's balance follows from what it has written and from chances that are never used again, so the
next token is a draw from the teacher whether the row guesses or not.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_distil.decode.drafters import Drafter, Drafts, Text, cool, draw, keys
from flax_distil.decode.greedy import Prompt, Sampling, SearchResult, likeliest, prefill
from flax_distil.decode.options import Acceptance
from flax_distil.decode.rules import Progress, RuleSet, advance, apply, begin
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip

PATIENCE = 3  # poor passes that a good one makes up for


class _Loop(NamedTuple):
    cache: Cache  # the teacher's: it has seen all but the newest token of each row
    memory: Any  # the drafter's
    text: Text
    log_probability_B: Array
    done_B: Array
    balance_B: Array  # accepted guesses beyond what guessing costs; below 0 the row writes alone
    acceptance: Acceptance

    def guessing(self) -> Array:
        """[B], which rows go on, and with guesses."""
        return (self.balance_B >= 0) & ~self.done_B


class _Verified(NamedTuple):
    """The teacher's next tokens: the first `agreed` are the drafter's too, then one of its own.

    gains: their log-probabilities. progress: what the rules knew before each of them.
    """

    tokens_BK: Array
    gains_BK: Array
    agreed_B: Array
    progress: Progress


@by_clip(
    static=("spec", "rules", "max_tokens", "draft_tokens"), whole=("params", "drafter", "head_DV")
)
def speculative(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    prompt: Prompt,
    active_B: Bool[Array, " B"],
    rules: RuleSet,
    max_tokens: int,
    drafter: Drafter,
    draft_audio_BSD: Float[Array, "B S E"],
    draft_tokens: int,
    sampling: Sampling | None = None,
    head_DV: Float[Array, "D V"] | None = None,
    break_even: float | Float[Array, ""] = 0.0,
) -> tuple[SearchResult, Acceptance]:
    """What `greedy` finds, in fewer passes of the teacher; with `sampling`, a draw from it.

    params: the teacher's decoder. draft_audio_BSD: what the drafter hears, `audio_BSD` where it
    shares the teacher's encoder. guesses: tokens drafted a pass, at least one. break_even: part of
    them that the teacher must accept, or a row goes on without (0: it never does).
    """
    decoder = spec.decoder(params)
    project, room = decoder.projection(head_DV), max_tokens + draft_tokens + 1
    cost = break_even * draft_tokens
    # Who can try again owes until then; who cannot has credit for some poor passes.
    most, earned = (0.0, cost / drafter.pause) if drafter.pause else (PATIENCE * cost, 0.0)

    def write(loop: _Loop, drafts: Drafts, guessing_B: Array) -> _Loop:
        read_BK = jnp.concatenate([loop.text.newest(1), drafts.tokens], axis=1)
        hidden_BKD, cache = decoder.step(read_BK, loop.cache)
        logits_BKV, progress = project(hidden_BKD), loop.text.progress
        verified = verify(logits_BKV, progress, drafts, guessing_B, rules, sampling)
        kept = _keep(loop._replace(cache=cache), verified, guessing_B, rules, limit_B)
        paid_B = loop.balance_B + verified.agreed_B - cost
        balance_B = jnp.where(guessing_B, jnp.minimum(paid_B, most), loop.balance_B + earned)
        return kept._replace(balance_B=balance_B)

    def guess(loop: _Loop) -> _Loop:
        drafts, memory = drafter.propose(loop.memory, loop.text, draft_tokens, rules, sampling)
        return write(loop._replace(memory=memory), drafts, loop.guessing())

    def alone(loop: _Loop) -> _Loop:
        return write(loop, no_guess, nobody_B)

    def go_on(loop: _Loop) -> _Loop:
        # Loops keep the caches where they are; branches would copy them.
        loop = jax.lax.while_loop(lambda loop: loop.guessing().any(), guess, loop)
        more = lambda loop: ~loop.done_B.all() & ~loop.guessing().any()
        return jax.lax.while_loop(more, alone, loop)

    # The first token is the prompt's own pass: no drafts to verify.
    hidden_B2D, cache = prefill(decoder, audio_BSD, prompt, room)
    logits_B2V = project(hidden_B2D)
    memory = drafter.start(draft_audio_BSD, prompt, room)
    remembered = max_tokens if rules.look_back else 0
    loop = _begin(cache, memory, prompt, room, remembered, active_B)
    loop = loop._replace(balance_B=loop.balance_B + (-cost if drafter.pause else most))
    limit_B = jnp.minimum(max_tokens, spec.dims.text_positions + 1 - loop.text.length)
    no_guess = Drafts(jnp.zeros((len(active_B), 0), jnp.int32), None)
    nobody_B = jnp.zeros_like(active_B)
    progress = loop.text.progress
    verified = verify(logits_B2V[:, 1:], progress, no_guess, nobody_B, rules, sampling)
    loop = _keep(loop, verified, nobody_B, rules, limit_B)
    loop = jax.lax.while_loop(lambda loop: ~loop.done_B.all(), go_on, loop)

    where_BL = jnp.arange(max_tokens) + jnp.broadcast_to(prompt.length, active_B.shape)[:, None]
    tokens_BL = jnp.take_along_axis(loop.text.tokens, where_BL, axis=1)
    written_BL = jnp.arange(max_tokens) < loop.acceptance.written[:, None]
    tokens_BL = jnp.where(written_BL, tokens_BL, rules.end)
    found = SearchResult(
        tokens=tokens_BL,
        lengths=(tokens_BL != rules.end).sum(axis=1),
        log_probability=loop.log_probability_B,
        no_speech=jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech],
    )
    return found, loop.acceptance


def verify(
    logits_BKV: Float[Array, "B K V"],
    progress: Progress,
    drafts: Drafts,
    guessing_B: Bool[Array, " B"],
    rules: RuleSet,
    sampling: Sampling | None = None,
) -> _Verified:
    """Agrees with the guesses from the left, as long as they are what the teacher would write.

    logits_BKV: the teacher's, before the first guess and after each of the K - 1. guessing_B: on
    other rows it agrees with none.
    """
    count, vocab = logits_BKV.shape[1:]
    steps = [progress]
    for index in range(count - 1):
        steps.append(advance(steps[-1], drafts.tokens[:, index], rules))
    every = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *steps)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every)
    logits_BKV = apply(rules.rules(), logits_BKV.reshape(-1, vocab), flat).reshape(logits_BKV.shape)
    if sampling is None:
        own_BK = likeliest(logits_BKV)
        agreed_B = _agreed((own_BK[:, :-1] == drafts.tokens) & guessing_B[:, None])
    else:
        own_B1, agreed_B = _reject(logits_BKV, progress, drafts, guessing_B, sampling)
        own_BK = jnp.broadcast_to(own_B1, logits_BKV.shape[:2])
    guessed_BK = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    tokens_BK = jnp.where(jnp.arange(count) < agreed_B[:, None], guessed_BK, own_BK)
    gains_BK1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BKV), tokens_BK[..., None], axis=-1)
    return _Verified(tokens_BK, gains_BK1[..., 0], agreed_B, every)


def _agreed(right_BK: Array) -> Array:
    """[B], how many are right before the first that is not."""
    return jnp.cumprod(right_BK, axis=1).sum(axis=1)


def _reject(
    logits_BKV: Array, progress: Progress, drafts: Drafts, guessing_B: Array, sampling: Sampling
) -> tuple[Array, Array]:
    """Rejection sampling: the teacher's own token [B 1] behind the guesses that stay, their number.

    A guess d out of q stays with probability min(1, p(d) / q(d)); in the place of one that may not
    comes a draw from max(p - q, 0). What is written is then distributed as p, whatever q is.
    """
    p_BKV = jax.nn.softmax(cool(logits_BKV, sampling))
    guesses, vocab = drafts.tokens.shape[1], p_BKV.shape[-1]
    if drafts.log_probability is None:
        q_BKV = jax.nn.one_hot(drafts.tokens, vocab)
    else:
        q_BKV = jnp.exp(drafts.log_probability)
    pick = lambda x_BKV: jnp.take_along_axis(x_BKV, drafts.tokens[..., None], axis=-1)[..., 0]
    uniform = lambda key: jax.random.uniform(key, (guesses,))
    chance_BK = jax.vmap(uniform)(keys(sampling, progress, 1))
    right_BK = chance_BK * pick(q_BKV) < pick(p_BKV[:, :-1])
    agreed_B = _agreed(right_BK & guessing_B[:, None])
    q_BKV = jnp.pad(q_BKV * guessing_B[:, None, None], ((0, 0), (0, 1), (0, 0)))
    there = lambda x_BKV: jnp.take_along_axis(x_BKV, agreed_B[:, None, None], axis=1)[:, 0]
    p_BV = there(p_BKV)
    rest_BV = jnp.maximum(p_BV - there(q_BKV), 0)
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    return draw(jnp.log(rest_BV), keys(sampling, progress, 0))[:, None], agreed_B


def _begin(
    cache: Cache, memory: Any, prompt: Prompt, room: int, remembered: int, active_B: Array
) -> _Loop:
    """Rows that have read their prompts and written nothing."""
    nothing_B = jnp.zeros(active_B.shape, jnp.int32)
    text = Text(
        tokens=jnp.pad(prompt.tokens, ((0, 0), (0, room))),
        length=nothing_B + prompt.length,
        progress=begin(len(active_B), remembered)._replace(index=nothing_B),
    )
    acceptance = Acceptance(*[nothing_B] * len(Acceptance._fields))
    zeros_B = jnp.zeros(active_B.shape)
    return _Loop(cache, memory, text, zeros_B, ~active_B, zeros_B, acceptance)


def _keep(
    loop: _Loop, verified: _Verified, guessing_B: Array, rules: RuleSet, limit_B: Array
) -> _Loop:
    """Each row takes its tokens, up to the first end and its limit; those behind are forgotten.

    They stay in the caches, behind the length, where nobody looks and the next ones overwrite them.
    """
    text, acceptance, count = loop.text, loop.acceptance, verified.tokens_BK.shape[1]
    ends_BK = verified.tokens_BK == rules.end
    until_end_B = jnp.where(ends_BK.any(axis=1), ends_BK.argmax(axis=1) + 1, count)
    kept_B = jnp.minimum(verified.agreed_B + 1, until_end_B)
    kept_B = jnp.where(loop.done_B, 0, jnp.minimum(kept_B, limit_B - acceptance.written))
    last_B = jnp.maximum(kept_B - 1, 0)
    pick = lambda leaf: jax.vmap(lambda row, last: row[last])(leaf, last_B)
    token_B = pick(verified.tokens_BK)
    advanced = advance(jax.tree.map(pick, verified.progress), token_B, rules)
    on_B = kept_B > 0
    renew = lambda new, old: jnp.where(on_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    text = Text(
        tokens=jax.vmap(write)(text.tokens, verified.tokens_BK, text.length),
        length=text.length + kept_B,
        progress=jax.tree.map(renew, advanced, text.progress),
    )
    gains_BK = jnp.where(jnp.arange(count) < kept_B[:, None], verified.gains_BK, 0)
    acceptance = Acceptance(
        passes=acceptance.passes + ~loop.done_B,
        alone=acceptance.alone + ~(loop.done_B | guessing_B),
        drafted=acceptance.drafted + jnp.where(guessing_B, count - 1, 0),
        accepted=acceptance.accepted + jnp.minimum(verified.agreed_B, kept_B),
        written=acceptance.written + kept_B,
    )
    return loop._replace(
        cache=loop.cache._replace(length=text.length - 1),
        text=text,
        log_probability_B=loop.log_probability_B + gains_BK.sum(axis=1),
        done_B=loop.done_B | (on_B & (token_B == rules.end)) | (acceptance.written >= limit_B),
        acceptance=acceptance,
    )
