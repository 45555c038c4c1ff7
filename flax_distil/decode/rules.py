"""Rules on the next token: pure functions on logits, applied in the order in which they are given.

They are Whisper's own (Radford et al. 2022, section 4.5 and the reference decoder's filters).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NOTHING = np.iinfo(np.int32).max  # no token: beyond any vocabulary, so that scatters drop it


class TextProgress(NamedTuple):
    """The state of the text that rules depend on, prompt excluded.

    index: number of tokens: a scalar where all rows have the same, else one a row.
    last, before: the last token and the one before it (-1 where there is none).
    latest: the latest timestamp token, or -1.
    written: all tokens, padded with `NOTHING`; only where a rule looks back further.
    """

    index: Int[Array, "..."]
    last: Int[Array, " B"]
    before: Int[Array, " B"]
    latest: Int[Array, " B"]
    written: Int[Array, "B L"] | None = None


Rule = Callable[[Float[Array, "B V"], TextProgress], Float[Array, "B V"]]


@dataclass(frozen=True)
class RuleSet:
    """The static description of a decoder's rules; hashable, so that it can be static under jit.

    timestamp_begin: the token of 0.00 s; timestamps are off where it is None.
    timestamp_end: the first token after that of 30 s, where a vocabulary has words after it.
    max_initial: the largest first timestamp, in steps of 0.02 s.
    prefixed: with timestamps, the prompt ends in 0.00 s and the first words of the text.
    repetition_penalty: divides positive and multiplies negative logits of earlier tokens.
    no_repeat_ngram: no sequence of this many tokens occurs twice; 0 allows it.
    """

    end: int
    no_speech: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    timestamp_begin: int | None = None
    no_timestamps: int = -1
    max_initial: int = 50
    prefixed: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    timestamp_end: int | None = None

    @property
    def look_back(self) -> bool:
        """Whether a rule needs `Progress.written`."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram > 0

    def rules(self) -> list[Rule]:
        """The rules in the order in which Transformers and Whisper apply them."""
        rules = []
        if self.repetition_penalty != 1:
            rules.append(penalize_repetition(self.repetition_penalty))
        if self.no_repeat_ngram:
            rules.append(no_repeat(self.no_repeat_ngram))
        rules += [suppress_first(self.suppressed_first), suppress(self.suppressed)]
        if self.timestamp_begin is not None:
            rules.append(suppress((self.no_timestamps,)))
            rules.append(
                timestamps(
                    self.timestamp_begin,
                    self.end,
                    self.max_initial,
                    self.prefixed,
                    self.timestamp_end,
                )
            )
        return rules


def start_progress(batch: int, remembered: int = 0) -> TextProgress:
    """The state of rows without text. remembered: most tokens that rules look back."""
    nothing = jnp.full((batch,), -1, jnp.int32)
    written = jnp.full((batch, remembered), NOTHING) if remembered else None
    return TextProgress(jnp.zeros((), jnp.int32), nothing, nothing, nothing, written)


def advance(progress: TextProgress, token_B: Int[Array, " B"], rules: RuleSet) -> TextProgress:
    """The state after one more token a row."""
    latest = progress.latest
    if rules.timestamp_begin is not None:
        is_time = _is_time(token_B, rules.timestamp_begin, rules.timestamp_end)
        latest = jnp.where(is_time, token_B, latest)
    written = progress.written
    if written is not None:
        written = written.at[jnp.arange(token_B.size), progress.index].set(token_B)
    return TextProgress(progress.index + 1, token_B, progress.last, latest, written)


def apply_rules(
    rules: Sequence[Rule], logits_BV: Float[Array, "B V"], progress: TextProgress
) -> Float[Array, "B V"]:
    """The logits after all rules, applied in turn."""
    for rule in rules:
        logits_BV = rule(logits_BV, progress)
    return logits_BV


def suppress(tokens: Sequence[int]) -> Rule:
    """Forbids these tokens."""

    def rule(logits_BV: Array, _: TextProgress) -> Array:
        return jnp.where(_among(tokens, logits_BV.shape[-1]), -jnp.inf, logits_BV)

    return rule


def suppress_first(tokens: Sequence[int]) -> Rule:
    """Forbids these tokens at the start: a text begins neither blank nor ended."""

    def rule(logits_BV: Array, progress: TextProgress) -> Array:
        hit = _among(tokens, logits_BV.shape[-1]) & (progress.index == 0)[..., None]
        return jnp.where(hit, -jnp.inf, logits_BV)

    return rule


def timestamps(
    begin: int, end: int, max_initial: int, prefixed: bool = False, stop: int | None = None
) -> Rule:
    """Timestamps come in pairs, never go back, open the text, and win where their mass is larger.

    begin: token of 0.00 s. end: the end-of-text token. max_initial: steps of 0.02 s. prefixed: the
    prompt has the first timestamp, 0.00 s. stop: first id of added words after the timestamps.
    """

    def rule(logits_BV: Array, progress: TextProgress) -> Array:
        token = jnp.arange(logits_BV.shape[-1])
        is_time = _is_time(token, begin, stop)
        latest, first = progress.latest, (progress.index == 0)[..., None]
        stamped = _is_time(progress.last, begin, stop)[:, None]
        before = _is_time(progress.before, begin, stop)
        if prefixed:
            latest, first = jnp.maximum(latest, begin), jnp.zeros_like(first)
        else:
            before |= progress.index < 2
        paired = stamped & before[:, None]
        # After a pair comes text; after a closing timestamp its twin or the end.
        forbidden = (paired & is_time) | (stamped & ~paired & (token < end))
        if stop is not None:
            forbidden |= stamped & ~paired & (token >= stop)
        # A closing timestamp may repeat the opening one only as the next one's beginning.
        floor = latest[:, None] + jnp.where(stamped & ~paired, 0, 1)
        forbidden |= (latest >= 0)[:, None] & is_time & (token < floor)
        forbidden |= first & (~is_time | (token > begin + max_initial))
        logits_BV = jnp.where(forbidden, -jnp.inf, logits_BV)
        log_probability_BV = jax.nn.log_softmax(logits_BV)
        times_BV = log_probability_BV[:, begin:stop]
        time_mass = jax.nn.logsumexp(times_BV, axis=-1, keepdims=True)
        best_text = log_probability_BV[:, :begin].max(axis=-1, keepdims=True)
        if stop is not None:
            best_word = log_probability_BV[:, stop:].max(axis=-1, keepdims=True)
            best_text = jnp.maximum(best_text, best_word)
        return jnp.where((time_mass > best_text) & ~is_time, -jnp.inf, logits_BV)

    return rule


def _is_time(token: Array, begin: int, stop: int | None) -> Array:
    is_time = token >= begin
    return is_time if stop is None else is_time & (token < stop)


def penalize_repetition(penalty: float) -> Rule:
    """Makes earlier tokens less probable by `penalty` (Keskar et al. 2019, section 4.1)."""

    def rule(logits_BV: Array, progress: TextProgress) -> Array:
        assert progress.written is not None
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        return jnp.where(_marked(progress.written, logits_BV), penalized_BV, logits_BV)

    return rule


def no_repeat(size: int) -> Rule:
    """Forbids the token that would complete a sequence of `size` tokens for the second time."""

    def rule(logits_BV: Array, progress: TextProgress) -> Array:
        assert progress.written is not None
        written_BL = progress.written
        if size > written_BL.shape[1]:
            return logits_BV
        count_B1 = jnp.broadcast_to(progress.index, progress.last.shape)[:, None]
        starts = jnp.arange(written_BL.shape[1] - size + 1)
        same_BS = starts + size - 1 < count_B1  # runs that are complete
        for offset in range(size - 1):
            now_B1 = jnp.maximum(count_B1 - size + 1 + offset, 0)
            recent_B1 = jnp.take_along_axis(written_BL, now_B1, axis=1)
            same_BS &= written_BL[:, starts + offset] == recent_B1
        last_BS = jnp.where(same_BS, written_BL[:, starts + size - 1], NOTHING)
        return jnp.where(_marked(last_BS, logits_BV), -jnp.inf, logits_BV)

    return rule


def _marked(tokens_BL: Array, logits_BV: Array) -> Array:
    """A [B V] mask of each row's tokens."""
    rows_B1 = jnp.arange(tokens_BL.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BL].set(True, mode="drop")


def _among(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """A constant [V] mask."""
    mask = np.zeros(vocab, bool)
    mask[[token for token in tokens if 0 <= token < vocab]] = True
    return mask
