"""Rules on the next token: Whisper's own (Radford et al. 2022, section 4.5, and the reference
decoder's filters), as pure functions on logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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


@dataclass(frozen=True)
class RuleSet:
    """The rules of a decoder; hashable, so that they can be static under jit.

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
    timestamp_end: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def start(self, rows: int, room: int) -> TextProgress:
        """The state of rows without text. room: most tokens of a text."""
        nothing_B, written_BL = jnp.full((rows,), -1, jnp.int32), None
        if self.repetition_penalty != 1 or self.no_repeat_ngram:
            written_BL = jnp.full((rows, room), NOTHING, jnp.int32)
        return TextProgress(jnp.zeros((), jnp.int32), nothing_B, nothing_B, nothing_B, written_BL)

    def advance(self, progress: TextProgress, token_B: Int[Array, " B"]) -> TextProgress:
        """The state after one more token a row."""
        latest_B = progress.latest
        if self.timestamp_begin is not None:
            latest_B = jnp.where(self._is_time(token_B), token_B, latest_B)
        written_BL = progress.written
        if written_BL is not None:
            written_BL = written_BL.at[jnp.arange(len(token_B)), progress.index].set(token_B)
        return TextProgress(progress.index + 1, token_B, progress.last, latest_B, written_BL)

    def apply(self, logits_BV: Float[Array, "B V"], progress: TextProgress) -> Float[Array, "B V"]:
        """The logits of the next token, -inf where a rule forbids it."""
        vocab = logits_BV.shape[-1]
        if progress.written is not None:
            logits_BV = self._repetition(logits_BV, progress.index, progress.written)
        # A text begins neither blank nor ended.
        first = jnp.reshape(progress.index == 0, (-1, 1))
        hit = _among(self.suppressed_first, vocab) & first
        logits_BV = jnp.where(hit, -jnp.inf, logits_BV)
        logits_BV = jnp.where(_among(self.suppressed, vocab), -jnp.inf, logits_BV)
        if self.timestamp_begin is None:
            return logits_BV
        logits_BV = jnp.where(_among((self.no_timestamps,), vocab), -jnp.inf, logits_BV)
        return self._timestamps(logits_BV, progress, self.timestamp_begin)

    def _repetition(self, logits_BV: Array, index: Array, written_BL: Array) -> Array:
        """Earlier tokens are less probable (Keskar et al. 2019, section 4.1), and none completes a
        sequence of `no_repeat_ngram` tokens for the second time."""
        if (penalty := self.repetition_penalty) != 1:
            penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
            logits_BV = jnp.where(_marked(written_BL, logits_BV), penalized_BV, logits_BV)
        size, (rows, room) = self.no_repeat_ngram, written_BL.shape
        if not 0 < size <= room:
            return logits_BV
        count_B1 = jnp.broadcast_to(index, (rows,))[:, None]
        starts = room - size + 1
        same_BS = jnp.arange(starts)[None] + size <= count_B1  # sequences that are complete
        for offset in range(size - 1):
            place_B1 = jnp.maximum(count_B1 - size + 1 + offset, 0)
            recent_B1 = jnp.take_along_axis(written_BL, place_B1, axis=1)
            same_BS &= written_BL[:, offset : offset + starts] == recent_B1
        repeated_BS = jnp.where(same_BS, written_BL[:, size - 1 :], NOTHING)
        return jnp.where(_marked(repeated_BS, logits_BV), -jnp.inf, logits_BV)

    def _timestamps(self, logits_BV: Array, progress: TextProgress, begin: int) -> Array:
        """Timestamps come in pairs, never go back, open the text, and win where their mass is
        larger."""
        token_1V, stop = jnp.arange(logits_BV.shape[-1])[None], self.timestamp_end
        is_time_1V = self._is_time(token_1V)
        latest_B1, first = progress.latest[:, None], jnp.reshape(progress.index == 0, (-1, 1))
        stamped_B1 = self._is_time(progress.last)[:, None]
        before_B1 = self._is_time(progress.before)[:, None]
        if self.prefixed:
            latest_B1, first = jnp.maximum(latest_B1, begin), jnp.zeros_like(first)
        else:
            before_B1 |= jnp.reshape(progress.index < 2, (-1, 1))
        # After a pair comes text; after a closing timestamp its twin or the end.
        closing_B1 = stamped_B1 & ~before_B1
        forbidden_BV = (stamped_B1 & before_B1 & is_time_1V) | (closing_B1 & (token_1V < self.end))
        if stop is not None:
            forbidden_BV |= closing_B1 & (token_1V >= stop)
        # A closing timestamp may repeat the opening one only as the next one's beginning.
        floor_B1 = latest_B1 + jnp.where(closing_B1, 0, 1)
        forbidden_BV |= (latest_B1 >= 0) & is_time_1V & (token_1V < floor_B1)
        forbidden_BV |= first & (~is_time_1V | (token_1V > begin + self.max_initial))
        logits_BV = jnp.where(forbidden_BV, -jnp.inf, logits_BV)
        log_probability_BV = jax.nn.log_softmax(logits_BV)
        times_BV = log_probability_BV[:, begin:stop]
        time_mass_B1 = jax.nn.logsumexp(times_BV, axis=-1, keepdims=True)
        best_text_B1 = log_probability_BV[:, :begin].max(axis=-1, keepdims=True)
        if stop is not None:
            best_word_B1 = log_probability_BV[:, stop:].max(axis=-1, keepdims=True)
            best_text_B1 = jnp.maximum(best_text_B1, best_word_B1)
        return jnp.where((time_mass_B1 > best_text_B1) & ~is_time_1V, -jnp.inf, logits_BV)

    def _is_time(self, token: Int[Array, "..."]) -> Bool[Array, "..."]:
        assert self.timestamp_begin is not None
        is_time = token >= self.timestamp_begin
        return is_time if self.timestamp_end is None else is_time & (token < self.timestamp_end)


def _marked(tokens_BL: Int[Array, "B L"], logits_BV: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    """A mask of each row's tokens."""
    rows_B1 = jnp.arange(len(tokens_BL))[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BL].set(True, mode="drop")


def _among(tokens: Sequence[int], vocab: int) -> Bool[np.ndarray, "1 V"]:
    """A constant mask of these tokens."""
    mask = np.zeros((1, vocab), bool)
    mask[0, [token for token in tokens if 0 <= token < vocab]] = True
    return mask
