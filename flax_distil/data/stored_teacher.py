"""What a label store can hold of its teacher, beside the labels, in one of two forms.

A row has a place for each token that the decoder reads: the prompt, from the start of transcript
on, and the label. Each is the distribution of the next token.

Final states are exact at every temperature, and need the teacher's embedding to make logits of
them. The likeliest tokens take less room, need nothing, and lose what they leave out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float16, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LikeliestTokens:
    """The teacher at each token of prompt and label: n places, or [B, L] in a batch."""

    top_tokens: Shaped[np.ndarray, "... K"]
    """uint16: the K likeliest tokens, the likeliest first."""
    top_log_probabilities: Shaped[np.ndarray, "... K"]
    """float16: theirs, at temperature 1."""
    tails: Shaped[np.ndarray, "... T"]
    """float32: log Σ p^(1/T) of all other tokens, for each temperature of the store."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FinalStates:
    """What the teacher's decoder makes its logits of, at the same places."""

    teacher_states: Float16[np.ndarray, "... D"]


StoredTeacher = LikeliestTokens | FinalStates


class StoredForm(NamedTuple):
    """How a label store holds its teacher: as final states where `width` is given."""

    top_k: int = 0
    temperatures: tuple[float, ...] = ()
    width: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "StoredForm | None":
        """That of a store with these settings; None where it holds none."""
        if width := settings.get("teacher_states"):
            return cls(width=width)
        if top_k := settings.get("top_k"):
            return cls(top_k, tuple(settings["top_k_temperatures"]))
        return None

    def columns(self) -> dict[str, tuple[int, Any]]:
        """Numbers at each place and their type, by column: the fields of `make`, in order."""
        if self.width:
            return {"teacher_states": (self.width, np.float16)}
        return {
            "top_tokens": (self.top_k, np.uint16),
            "top_log_probabilities": (self.top_k, np.float16),
            "tails": (len(self.temperatures), np.float32),
        }

    def make(self, columns: Sequence[Any]) -> StoredTeacher:
        """What these arrays hold, in the order of `columns`."""
        return FinalStates(*columns) if self.width else LikeliestTokens(*columns)


def places(stored: StoredTeacher) -> int:
    """Tokens it is there for."""
    return len(jax.tree.leaves(stored)[0])


def first_places(stored: StoredTeacher, count: int) -> StoredTeacher:
    """The teacher at the first `count` tokens."""
    return jax.tree.map(lambda leaf: leaf[:count], stored)


def read_stored(row: Mapping[str, Any]) -> StoredTeacher | None:
    """A row's columns, None where it has none."""
    for form in (StoredForm(width=1), StoredForm(top_k=1)):
        columns = form.columns()
        if all(row.get(name) is not None for name in columns):
            return form.make([np.asarray(row[name], kind) for name, (_, kind) in columns.items()])
    return None


def collate_stored(
    rows: Sequence[tuple[int, StoredTeacher | None]], length: int
) -> StoredTeacher | None:
    """Rows padded to `length` places; None where no row has any.

    A row's first token is learnt at place `start`, which stands beside it.
    """
    there = [stored for _, stored in rows if stored is not None]
    if not there:
        return None

    def padded(name: str) -> np.ndarray:
        like = getattr(there[0], name)
        whole = np.zeros((len(rows), length, like.shape[-1]), like.dtype)
        for line, (start, stored) in zip(whole, rows, strict=True):
            if stored is not None:
                line[start : start + places(stored)] = getattr(stored, name)
        return whole

    return type(there[0])(**{name: padded(name) for name in vars(there[0])})
