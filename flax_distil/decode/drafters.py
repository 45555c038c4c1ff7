"""Drafters of speculative decoding: a smaller model, or a look-up in the text itself.

A drafter is a pytree with two functions. `start(audio_BSD, prompt, room)` returns its memory;
`propose(memory, text, count, rules, sampling)` drafts `count` tokens a row and returns the memory.
What its memory holds beyond a row's accepted text is overwritten later.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_distil.decode.hypothesis import Acceptance
from flax_distil.decode.rules import RuleSet, TextProgress, advance, apply_rules
from flax_distil.decode.search import Prompt, Sampling, likeliest, prefill
from flax_distil.model.precision import product
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache
from flax_distil.text.tokens import WhisperTokens

ENOUGH_DRAFTS = 50  # draft tokens that make an acceptance rate reliable


class DraftedText(NamedTuple):
    """The tokens of every row, prompt included, and the state that rules depend on.

    tokens: padded on the right. length: without padding, at least two.
    """

    tokens: Int[Array, "B W"]
    length: Int[Array, " B"]
    progress: TextProgress

    def newest(self, count: int) -> Int[Array, "B N"]:
        """The last `count` tokens of every row."""
        where_BN = self.length[:, None] + jnp.arange(-count, 0)
        return jnp.take_along_axis(self.tokens, where_BN, axis=1)


class Drafts(NamedTuple):
    """Draft tokens, and the log-probabilities they were drawn from (None where not drawn)."""

    tokens: Int[Array, "B K"]
    log_probability: Float[Array, "B K V"] | None


@runtime_checkable
class Drafter(Protocol):
    """What `speculative` needs of a drafter."""

    def start(self, audio_BSD: Array, prompt: Prompt, room: int) -> Any: ...

    def propose(
        self, memory: Any, text: DraftedText, count: int, rules: RuleSet, sampling: Sampling | None
    ) -> tuple[Drafts, Any]: ...


@dataclass(frozen=True, eq=False)
class Assistant:
    """A drafter with its settings.

    draft_tokens: drafted for each pass of the model.
    break_even: acceptance rate below which it costs more time than it saves.
    encoder: its own, as spec and parameters; None where it uses the model's audio states.
    """

    drafter: Drafter
    draft_tokens: int
    break_even: float = 0.0
    encoder: tuple[Spec, Params] | None = None

    def pays(self, acceptance: Acceptance | None) -> bool:
        """Whether it saves time, judged by what was accepted so far of enough draft tokens."""
        if acceptance is None or acceptance.drafted < ENOUGH_DRAFTS:
            return True
        return acceptance.rate >= self.break_even


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "head_DU", "vocabulary"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, eq=False)
class ModelDrafter:
    """A Whisper with the same tokenizer: the student, or a smaller one (`model_drafter`).

    params: the decoder's. head_DU: its embedding transposed, of the ids that it may draft.
    vocabulary: these ids; None for all.
    """

    spec: Spec
    params: Params
    head_DU: Float[Array, "D U"]
    vocabulary: Int[Array, " U"] | None = None

    def start(self, audio_BSD: Float[Array, "B S D"], prompt: Prompt, room: int) -> Cache:
        """A cache that holds the prompt."""
        cache = prefill(self.spec.decoder(self.params), audio_BSD, prompt, room)[1]
        return cache._replace(length=jnp.broadcast_to(cache.length, audio_BSD.shape[:1]))

    def propose(
        self,
        memory: Cache,
        text: DraftedText,
        count: int,
        rules: RuleSet,
        sampling: Sampling | None,
    ) -> tuple[Drafts, Cache]:
        """Its own `count` next tokens, under the same rules."""
        decoder, allowed = self.spec.decoder(self.params), rules.rules()
        project = self._projection()

        def draft(tokens_BL: Array, cache: Any, progress: TextProgress, turn: Array | int):
            hidden_BLD, cache = decoder.step(tokens_BL, cache)
            logits_BV = apply_rules(allowed, project(hidden_BLD[:, -1]), progress)
            if sampling is None:
                token_B, scores_BV = likeliest(logits_BV), None
            else:
                scores_BV = jax.nn.log_softmax(at_temperature(logits_BV, sampling))
                token_B = draw_tokens(scores_BV, row_keys(sampling, text.progress, turn))
            return (token_B[:, None], cache, advance(progress, token_B, rules)), (
                token_B,
                scores_BV,
            )

        # The last but one token is read again: it is new to the drafter when all were accepted.
        memory = memory._replace(length=text.length - 2)
        # Keys 0 and 1 are the verifier's.
        carry, first = draft(text.newest(2), memory, text.progress, 2)
        step = lambda carry, turn: draft(*carry, turn=turn)
        carry, others = jax.lax.scan(step, carry, jnp.arange(3, count + 2))
        join = lambda one, more: jnp.moveaxis(jnp.concatenate([one[None], more]), 0, 1)
        return Drafts(*jax.tree.map(join, first, others)), carry[1]

    def _projection(self):
        """Hidden states [B D] to logits over all ids, -inf on those it may not draft."""
        if self.vocabulary is None:
            return lambda hidden_BD: product("bd,du->bu", hidden_BD, self.head_DU)
        size = len(self.vocabulary)
        place_V = jnp.full(self.spec.dims.vocab, size).at[self.vocabulary].set(jnp.arange(size))

        def project(hidden_BD: Array) -> Array:
            logits_BU = product("bd,du->bu", hidden_BD, self.head_DU)
            padded_BU = jnp.pad(logits_BU, ((0, 0), (0, 1)), constant_values=-jnp.inf)
            return padded_BU[:, place_V]

        return project


def model_drafter(
    spec: Spec, params: Params, vocabulary: Int[Array, " U"] | None = None
) -> ModelDrafter:
    """A decoder that may draft the ids of `vocabulary`, all where None.

    Half of a small decoder's step is its projection on the whole vocabulary. A drafter can leave
    out the rare ids, since the model that verifies has all of them.
    """
    embedding_VD = jnp.asarray(params["tokens"]["embedding"], spec.dtype)
    kept_UD = embedding_VD if vocabulary is None else embedding_VD[vocabulary]
    return ModelDrafter(spec, params, kept_UD.T, vocabulary)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["longest"])
@dataclass(frozen=True)
class LookupDrafter:
    """Copies what followed the newest tokens where they occurred before; needs no model.

    It helps where text repeats itself or its prompt. longest: most tokens to match; the longest
    match wins, then the latest.
    """

    longest: int = 4

    def start(self, audio_BSD: Array, prompt: Prompt, room: int) -> None:
        """It needs no memory."""

    def propose(
        self, memory: None, text: DraftedText, count: int, rules: RuleSet, sampling: Sampling | None
    ) -> tuple[Drafts, None]:
        """The tokens after the best earlier match, repeated where they reach the newest."""
        width = text.tokens.shape[1]
        earlier_BW = jnp.arange(width) < text.length[:, None] - 1
        newest_BN = text.newest(self.longest)[:, ::-1]
        matches_BW, running_BW = jnp.zeros(text.tokens.shape, jnp.int32), earlier_BW
        for back in range(self.longest):
            shifted_BW = jnp.pad(text.tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :width]
            running_BW &= shifted_BW == newest_BN[:, back, None]
            matches_BW += running_BW
        best_B = jnp.where(earlier_BW, matches_BW * width + jnp.arange(width), -1).argmax(-1)
        period_B = text.length - 1 - best_B
        ahead_BK = best_B[:, None] + 1 + jnp.arange(count) % period_B[:, None]
        return Drafts(jnp.take_along_axis(text.tokens, ahead_BK, axis=1), None), None


def at_temperature(logits: Float[Array, "B ... V"], sampling: Sampling) -> Float[Array, "B ... V"]:
    """Logits at each row's temperature; at 0 the most probable token has probability 1."""
    temperature_B = jnp.maximum(sampling.temperature, 1e-6)
    return logits / temperature_B.reshape(-1, *[1] * (logits.ndim - 1))


def row_keys(sampling: Sampling, progress: TextProgress, turn: Array | int) -> Array:
    """A key a row, from its own seed and position in the text."""
    fold = lambda seed, index: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), index), turn
    )
    return jax.vmap(fold)(sampling.seed, progress.index)


def draw_tokens(scores: Float[Array, "B ... V"], keys_B: Array) -> Int[Array, "B ..."]:
    """Tokens, from unnormalised log-probabilities."""
    return jax.vmap(jax.random.categorical)(keys_B, scores).astype(jnp.int32)


def frequent_ids(tokens: WhisperTokens, size: int) -> Int[np.ndarray, " U"]:
    """The `size` most frequent text ids, with the end of text and all timestamps.

    The first ids are the most frequent: byte pairs were merged in order of frequency.
    """
    suppressed = set(tokens.suppressed)
    frequent = [token for token in range(tokens.eot) if token not in suppressed][:size]
    times = range(tokens.timestamp_begin, tokens.vocabulary)  # and added words
    return np.array([*frequent, tokens.eot, *times], np.int32)
