"""Drafters of speculative decoding: a smaller model, or a look-up in the text itself.

A drafter is a pytree with two functions. `start(audio_BSD, prompt, room)` returns its memory;
`propose(memory, text, count, rules, sampling)` drafts `count` tokens a row and returns the memory.
What its memory holds beyond a row's accepted text is overwritten later.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_distil.decode import search
from flax_distil.decode.rules import RuleSet, TextProgress
from flax_distil.decode.search import Acceptance, DecoderModel, Prompt, Sampling
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache

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
        where_BN = self.length[:, None] + jnp.arange(-count, 0)[None]
        return jnp.take_along_axis(self.tokens, where_BN, axis=1)


class Drafts(NamedTuple):
    """Draft tokens, and the log-probabilities they were drawn from (None where not drawn)."""

    tokens: Int[Array, "B K"]
    log_probability: Float[Array, "B K V"] | None


@partial(jax.tree_util.register_dataclass, data_fields=["model"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class ModelDrafter:
    """A Whisper with the same tokenizer: the student, or a smaller one (`model_drafter`)."""

    model: DecoderModel

    def start(self, audio_BSD: Float[Array, "B S D"], prompt: Prompt, room: int) -> Cache:
        """A cache that holds the prompt."""
        cache = search.prefill(self.model.decoder(), audio_BSD, prompt, room)[1]
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
        decoder = self.model.decoder()
        project = decoder.projection(self.model.head_DV)

        def draft(carry: tuple[Array, Cache, TextProgress], turn: Array | int):
            tokens_BL, cache, progress = carry
            hidden_BLD, cache = decoder.step(tokens_BL, cache)
            logits_BV = rules.apply(project(hidden_BLD[:, -1:])[:, 0], progress)
            if sampling is None:
                token_B, scores_BV = search.likeliest(logits_BV), None
            else:
                scores_BV = jax.nn.log_softmax(search.at_temperature(logits_BV, sampling))
                token_B = search.draw_tokens(scores_BV, row_keys(sampling, text.progress, turn))
            carry = token_B[:, None], cache, rules.advance(progress, token_B)
            return carry, (token_B, scores_BV)

        # The last but one token is read again: it is new to the drafter when all were accepted.
        memory = memory._replace(length=text.length - 2)
        # Keys 0 and 1 are the verifier's.
        carry, first = draft((text.newest(2), memory, text.progress), 2)
        carry, others = jax.lax.scan(draft, carry, jnp.arange(3, count + 2))
        join = lambda one, more: jnp.moveaxis(jnp.concatenate([one[None], more]), 0, 1)
        return Drafts(*jax.tree.map(join, first, others)), carry[1]


def model_drafter(spec: Spec, params: Params) -> ModelDrafter:
    """The drafter of a decoder, whose embedding it keeps transposed. params: the decoder's."""
    head_DV = jnp.asarray(params["tokens"]["embedding"], spec.dtype).T
    return ModelDrafter(DecoderModel(spec, params, head_DV))


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
        place_1W = jnp.arange(width)[None]
        earlier_BW = place_1W < text.length[:, None] - 1
        newest_BN = text.newest(self.longest)[:, ::-1]
        matches_BW, running_BW = jnp.zeros(text.tokens.shape, jnp.int32), earlier_BW
        for back in range(self.longest):
            shifted_BW = jnp.pad(text.tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :width]
            running_BW &= shifted_BW == newest_BN[:, back, None]
            matches_BW += running_BW
        best_B1 = jnp.where(earlier_BW, matches_BW * width + place_1W, -1).argmax(-1, keepdims=True)
        period_B1 = text.length[:, None] - 1 - best_B1
        ahead_BK = best_B1 + 1 + jnp.arange(count)[None] % period_B1
        return Drafts(jnp.take_along_axis(text.tokens, ahead_BK, axis=1), None), None


Drafter = ModelDrafter | LookupDrafter


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


def row_keys(sampling: Sampling, progress: TextProgress, turn: Array | int) -> Array:
    """A random key a row, from its own seed and position in the text."""
    fold = lambda seed, index: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), index), turn
    )
    return jax.vmap(fold)(sampling.seed, progress.index)
