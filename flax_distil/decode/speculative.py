"""Speculative decoding (paper section 3.3, Leviathan et al. 2023): a drafter guesses some tokens,
the teacher verifies them in one pass, and every row of the batch keeps what it may.

A step of the decoder costs the reading of its weights and of the audio's keys and values, for one
token as for five. What is written is the teacher's: token for token its greedy text, or a sample of
its distribution.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flax_distil.decode.drafters import Drafter, Drafts, Text, cool, draw, keys
from flax_distil.decode.greedy import Found, Prompt, Sampling, likeliest, prefill
from flax_distil.decode.options import Tally
from flax_distil.decode.rules import Progress, RuleSet, advance, apply, begin
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache
from flax_distil.parallel.clips import by_clip


class _Loop(NamedTuple):
    cache: Cache  # the teacher's: it has seen all but the newest token of each row
    memory: Any  # the drafter's
    text: Text
    log_probability_B: Array
    done_B: Array
    tally: Tally


class _Verdict(NamedTuple):
    """The teacher's next tokens: the first `agreed` are the drafter's too, then one of its own.

    gains: their log-probabilities. progress: what the rules knew before each of them.
    """

    tokens_BK: Array
    gains_BK: Array
    agreed_B: Array
    progress: Progress


@by_clip(static=("spec", "rules", "max_tokens", "guesses"), whole=("params", "drafter", "head_DV"))
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
    guesses: int,
    sampling: Sampling | None = None,
    head_DV: Float[Array, "D V"] | None = None,
) -> tuple[Found, Tally]:
    """What `greedy` finds, in fewer passes of the teacher; with `sampling`, a draw from it.

    params: the teacher's decoder. draft_audio_BSD: what the drafter hears, `audio_BSD` where it
    shares the teacher's encoder. guesses: tokens drafted a pass, at least one.
    """
    decoder = spec.decoder(params)
    project, room = decoder.projection(head_DV), max_tokens + guesses + 1

    def write(loop: _Loop) -> _Loop:
        drafts, memory = drafter.propose(loop.memory, loop.text, guesses, rules, sampling)
        read_BK = jnp.concatenate([loop.text.newest(1), drafts.tokens], axis=1)
        hidden_BKD, cache = decoder.step(read_BK, loop.cache)
        verdict = judge(project(hidden_BKD), loop.text.progress, drafts, rules, sampling)
        return _keep(loop._replace(cache=cache, memory=memory), verdict, rules, limit_B)

    # The first token is the prompt's own pass: a verdict on no guesses.
    hidden_B2D, cache = prefill(decoder, audio_BSD, prompt, room)
    logits_B2V = project(hidden_B2D)
    memory = drafter.start(draft_audio_BSD, prompt, room)
    remembered = max_tokens if rules.look_back else 0
    loop = _begin(cache, memory, prompt, room, remembered, active_B)
    limit_B = jnp.minimum(max_tokens, spec.dims.text_positions + 1 - loop.text.length)
    no_guess = Drafts(jnp.zeros((len(active_B), 0), jnp.int32), None)
    verdict = judge(logits_B2V[:, 1:], loop.text.progress, no_guess, rules, sampling)
    loop = _keep(loop, verdict, rules, limit_B)
    loop = jax.lax.while_loop(lambda loop: ~loop.done_B.all(), write, loop)

    where_BL = jnp.arange(max_tokens) + jnp.broadcast_to(prompt.length, active_B.shape)[:, None]
    tokens_BL = jnp.take_along_axis(loop.text.tokens, where_BL, axis=1)
    written_BL = jnp.arange(max_tokens) < loop.tally.written[:, None]
    tokens_BL = jnp.where(written_BL, tokens_BL, rules.end)
    found = Found(
        tokens=tokens_BL,
        lengths=(tokens_BL != rules.end).sum(axis=1),
        log_probability=loop.log_probability_B,
        no_speech=jax.nn.softmax(logits_B2V[:, 0])[:, rules.no_speech],
    )
    return found, loop.tally


def judge(
    logits_BKV: Float[Array, "B K V"],
    progress: Progress,
    drafts: Drafts,
    rules: RuleSet,
    sampling: Sampling | None = None,
) -> _Verdict:
    """Agrees with the guesses from the left, as long as they are what the teacher would write.

    logits_BKV: the teacher's, before the first guess and after each of the K - 1.
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
        right_BK = own_BK[:, :-1] == drafts.tokens
    else:
        own_BK, right_BK = _reject(logits_BKV, progress, drafts, sampling)
    agreed_B = jnp.cumprod(right_BK, axis=1).sum(axis=1)
    guessed_BK = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    tokens_BK = jnp.where(jnp.arange(count) < agreed_B[:, None], guessed_BK, own_BK)
    gains_BK1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BKV), tokens_BK[..., None], axis=-1)
    return _Verdict(tokens_BK, gains_BK1[..., 0], agreed_B, every)


def _reject(
    logits_BKV: Array, progress: Progress, drafts: Drafts, sampling: Sampling
) -> tuple[Array, Array]:
    """Rejection sampling: a draw of the teacher's at each place, and which guesses may stay.

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
    chance_BK = jax.vmap(uniform)(keys(sampling, progress, guesses))
    right_BK = chance_BK * pick(q_BKV) < pick(p_BKV[:, :-1])
    rest_BKV = jnp.maximum(p_BKV - jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0))), 0)
    rest_BKV = jnp.where(rest_BKV.sum(-1, keepdims=True) > 0, rest_BKV, p_BKV)
    return draw(jnp.log(rest_BKV), keys(sampling, progress, guesses + 1)), right_BK


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
    tally = Tally(nothing_B, nothing_B, nothing_B, nothing_B)
    return _Loop(cache, memory, text, jnp.zeros(active_B.shape), ~active_B, tally)


def _keep(loop: _Loop, verdict: _Verdict, rules: RuleSet, limit_B: Array) -> _Loop:
    """Each row takes its tokens, up to the first end and its limit; those behind are forgotten.

    They stay in the caches, behind the length, where nobody looks and the next ones overwrite them.
    """
    text, tally, count = loop.text, loop.tally, verdict.tokens_BK.shape[1]
    ends_BK = verdict.tokens_BK == rules.end
    until_end_B = jnp.where(ends_BK.any(axis=1), ends_BK.argmax(axis=1) + 1, count)
    kept_B = jnp.minimum(verdict.agreed_B + 1, until_end_B)
    kept_B = jnp.where(loop.done_B, 0, jnp.minimum(kept_B, limit_B - tally.written))
    last_B = jnp.maximum(kept_B - 1, 0)
    pick = lambda leaf: jax.vmap(lambda row, last: row[last])(leaf, last_B)
    token_B = pick(verdict.tokens_BK)
    advanced = advance(jax.tree.map(pick, verdict.progress), token_B, rules)
    on_B = kept_B > 0
    renew = lambda new, old: jnp.where(on_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    text = Text(
        tokens=jax.vmap(write)(text.tokens, verdict.tokens_BK, text.length),
        length=text.length + kept_B,
        progress=jax.tree.map(renew, advanced, text.progress),
    )
    gains_BK = jnp.where(jnp.arange(count) < kept_B[:, None], verdict.gains_BK, 0)
    tally = Tally(
        passes=tally.passes + ~loop.done_B,
        drafted=tally.drafted + jnp.where(loop.done_B, 0, count - 1),
        accepted=tally.accepted + jnp.minimum(verdict.agreed_B, kept_B),
        written=tally.written + kept_B,
    )
    return _Loop(
        cache=loop.cache._replace(length=text.length - 1),
        memory=loop.memory,
        text=text,
        log_probability_B=loop.log_probability_B + gains_BK.sum(axis=1),
        done_B=loop.done_B | (on_B & (token_B == rules.end)) | (tally.written >= limit_B),
        tally=tally,
    )
