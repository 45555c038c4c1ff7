"""What a label store can hold of the teacher's distributions, beside the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

# Columns of a label store, in the order of the fields below.
COLUMNS = {"top_tokens": np.uint16, "top_log_probabilities": np.float16, "tails": np.float32}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredTeacher:
    """The teacher at each token of a label and at its end: n places, or [B, L] in a batch."""

    top_tokens: Shaped[np.ndarray, "... K"]
    """uint16: the K likeliest tokens, the likeliest first."""
    top_log_probabilities: Shaped[np.ndarray, "... K"]
    """float16: theirs, at temperature 1."""
    tails: Shaped[np.ndarray, "... T"]
    """float32: log Σ p^(1/T) of all other tokens, for each temperature of the store."""


def read_stored(row: dict[str, Any]) -> StoredTeacher | None:
    """A row's columns, None where it has none."""
    if any(row.get(name) is None for name in COLUMNS):
        return None
    return StoredTeacher(*(np.asarray(row[name], dtype) for name, dtype in COLUMNS.items()))


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
                line[start : start + len(stored.tails)] = getattr(stored, name)
        return whole

    return StoredTeacher(*map(padded, COLUMNS))
