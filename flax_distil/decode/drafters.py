"""Who guesses the next tokens for `speculative` to verify: a smaller model, or the text itself.

A drafter is a pytree with two functions. `start(audio_BSD, prompt, room)` gives it its memory;
`propose(memory, text, count, rules, sampling)` drafts `count` tokens a row and gives the memory
back. What it remembers beyond a row's accepted text is overwritten later.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_distil.decode.greedy import Prompt, Sampling, likeliest, prefill
from flax_distil.decode.rules import Progress, RuleSet, advance, apply
from flax_distil.model.precision import product
from flax_distil.model.spec import Params, Spec
from flax_distil.model.whisper import Cache
from flax_distil.text.tokens import WhisperTokens


class Text(NamedTuple):
    """All tokens of every row, its prompt first, and what the rules know of them.

    tokens: padded on the right. length: how many count, at least two.
    """

    tokens: Int[Array, "B W"]
    length: Int[Array, " B"]
    progress: Progress

    def newest(self, count: int) -> Int[Array, "B N"]:
        """The last `count` tokens of every row."""
        where_BN = self.length[:, None] + jnp.arange(-count, 0)
        return jnp.take_along_axis(self.tokens, where_BN, axis=1)


class Drafts(NamedTuple):
    """Guesses, and the log-probabilities they were drawn from (None where none were drawn)."""

    tokens: Int[Array, "B K"]
    log_probability: Float[Array, "B K V"] | None


class Drafter(Protocol):
    """What `speculative` asks of one.

    pause: passes of the teacher from a poor guess to the next one; None where it does not guess
    again in that window.
    """

    @property
    def pause(self) -> int | None: ...

    def start(self, audio_BSD: Array, prompt: Prompt, room: int) -> Any: ...

    def propose(
        self, memory: Any, text: Text, count: int, rules: RuleSet, sampling: Sampling | None
    ) -> tuple[Drafts, Any]: ...


@dataclass(frozen=True, eq=False)
class Assistant:
    """A drafter, how many tokens it guesses at a time, and its encoder where it has its own.

    break_even: part of the guesses that must be accepted; with fewer it is not asked further.
    """

    drafter: Drafter
    draft_tokens: int
    break_even: float = 0.0
    encoder: tuple[Spec, Params] | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "head_DU", "vocabulary"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, eq=False)
class ModelDrafter:
    """A Whisper with the same tokenizer: the student, or a smaller one (`model_drafter`).

    params: the decoder's. head_DU: its embedding transposed, of the ids it may guess. vocabulary:
    these ids, all where None.
    """

    spec: Spec
    params: Params
    head_DU: Float[Array, "D U"]
    vocabulary: Int[Array, " U"] | None = None

    @property
    def pause(self) -> None:
        """None: its cache lacks what is written without it."""

    def start(self, audio_BSD: Float[Array, "B S D"], prompt: Prompt, room: int) -> Cache:
        """The prompt, read."""
        cache = prefill(self.spec.decoder(self.params), audio_BSD, prompt, room)[1]
        return cache._replace(length=jnp.broadcast_to(cache.length, audio_BSD.shape[:1]))

    def propose(
        self, memory: Cache, text: Text, count: int, rules: RuleSet, sampling: Sampling | None
    ) -> tuple[Drafts, Cache]:
        """Its own `count` next tokens, under the same rules."""
        decoder, allowed = self.spec.decoder(self.params), rules.rules()
        project = self._projection()

        def guess(tokens_BL: Array, cache: Any, progress: Progress, turn: Array | int):
            hidden_BLD, cache = decoder.step(tokens_BL, cache)
            logits_BV = apply(allowed, project(hidden_BLD[:, -1]), progress)
            if sampling is None:
                token_B, scores_BV = likeliest(logits_BV), None
            else:
                scores_BV = jax.nn.log_softmax(cool(logits_BV, sampling))
                token_B = draw(scores_BV, keys(sampling, text.progress, turn))
            return (token_B[:, None], cache, advance(progress, token_B, rules)), (
                token_B,
                scores_BV,
            )

        # The last but one token is read again: it is new to the drafter when all were accepted.
        memory = memory._replace(length=text.length - 2)
        # Keys 0 and 1 are the verifier's.
        carry, first = guess(text.newest(2), memory, text.progress, 2)
        step = lambda carry, turn: guess(*carry, turn=turn)
        carry, others = jax.lax.scan(step, carry, jnp.arange(3, count + 2))
        join = lambda one, more: jnp.moveaxis(jnp.concatenate([one[None], more]), 0, 1)
        return Drafts(*jax.tree.map(join, first, others)), carry[1]

    def _projection(self):
        """Hidden states [B D] to logits over all ids, -inf on those it may not guess."""
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
    """A decoder that may guess the ids of `vocabulary`, all where None.

    Half of a small decoder's step is its projection on the whole vocabulary; a draft does without
    the rare part, since the verifier has all of it.
    """
    embedding_VD = jnp.asarray(params["tokens"]["embedding"], spec.dtype)
    kept_UD = embedding_VD if vocabulary is None else embedding_VD[vocabulary]
    return ModelDrafter(spec, params, kept_UD.T, vocabulary)


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["longest", "pause"])
@dataclass(frozen=True)
class LookupDrafter:
    """What followed the last time: copies from where the newest tokens stood before.

    No model. It pays where text repeats itself or its prompt. longest: tokens to match at most;
    the longest match wins, then the latest. pause: as of any `Drafter`.
    """

    longest: int = 4
    pause: int = 32

    def start(self, audio_BSD: Array, prompt: Prompt, room: int) -> None:
        """It remembers nothing: the text says all."""

    def propose(
        self, memory: None, text: Text, count: int, rules: RuleSet, sampling: Sampling | None
    ) -> tuple[Drafts, None]:
        """The tokens behind the best earlier match, gone round where it reaches the newest."""
        width = text.tokens.shape[1]
        earlier_BW = jnp.arange(width) < text.length[:, None] - 1
        newest_BN = text.newest(self.longest)[:, ::-1]
        matches_BW, running_BW = jnp.zeros(text.tokens.shape, jnp.int32), earlier_BW
        for back in range(self.longest):
            there_BW = jnp.pad(text.tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :width]
            running_BW &= there_BW == newest_BN[:, back, None]
            matches_BW += running_BW
        best_B = jnp.where(earlier_BW, matches_BW * width + jnp.arange(width), -1).argmax(-1)
        period_B = text.length - 1 - best_B
        ahead_BK = best_B[:, None] + 1 + jnp.arange(count) % period_B[:, None]
        return Drafts(jnp.take_along_axis(text.tokens, ahead_BK, axis=1), None), None


def cool(logits: Float[Array, "B ... V"], sampling: Sampling) -> Float[Array, "B ... V"]:
    """Logits at each row's temperature; at 0 the most probable token has it all."""
    temperature_B = jnp.maximum(sampling.temperature, 1e-6)
    return logits / temperature_B.reshape(-1, *[1] * (logits.ndim - 1))


def keys(sampling: Sampling, progress: Progress, turn: Array | int) -> Array:
    """A key a row, of its own seed and place in the text: neighbours do not matter."""
    fold = lambda seed, index: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), index), turn
    )
    return jax.vmap(fold)(sampling.seed, progress.index)


def draw(scores: Float[Array, "B ... V"], keys_B: Array) -> Int[Array, "B ..."]:
    """Tokens, from unnormalised log-probabilities."""
    return jax.vmap(jax.random.categorical)(keys_B, scores).astype(jnp.int32)


def frequent_ids(
    tokens: WhisperTokens, size: int, texts: Iterable[Sequence[int]] = ()
) -> Int[np.ndarray, " U"]:
    """The `size` text ids that are worth a guess, and the end and all timestamps with them.

    texts: ids of transcripts, such as the pseudo-labels; the ids are ranked by how often they
    occur there, then by their place in the vocabulary: byte pairs were merged in order of
    frequency.
    """
    counts_V = np.zeros(tokens.vocabulary, np.int64)
    for ids in texts:
        np.add.at(counts_V, np.asarray(ids, np.int64), 1)
    counts_V[[token for token in tokens.suppressed if 0 <= token < tokens.vocabulary]] = -1
    ranked = np.argsort(-counts_V[: tokens.eot], kind="stable")[:size]
    times = np.arange(tokens.timestamp_begin, tokens.vocabulary)  # and added words
    return np.concatenate([np.sort(ranked), [tokens.eot], times]).astype(np.int32)
