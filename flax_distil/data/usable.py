"""Which rows of a dataset can be learnt, and why the others cannot.

One row never ends a run: a language that the checkpoint lacks, a missing label or one that no
bucket holds is left out and counted, by the same rules for datasets, streams and labelling.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Int

from flax_distil.data.batches import TargetOptions, longest_prompt
from flax_distil.data.utterances import Utterances, cell_bool
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnableRows:
    """The rows of a dataset that can be learnt, and the reasons against all others."""

    speech: Int[np.ndarray, "n"]
    non_speech: Int[np.ndarray, "m"]
    """Rows in which nobody speaks."""
    left_out: dict[str, list[int]]
    """Rows by the reason for which they are left out."""


def language_reason(language: str | None, tokens: WhisperTokens) -> str | None:
    """Why a checkpoint cannot learn a language; None where it can."""
    if language is None and tokens.multilingual:
        return "no language is named"
    return tokens.unsupported(language)


def usable_rows(
    utterances: Utterances,
    lengths: Int[np.ndarray, "n"],
    options: TargetOptions,
    tokens: WhisperTokens,
    packed: bool = False,
) -> LearnableRows:
    """The rows that can be learnt.

    lengths: tokens of what each row has to learn; 0 where it is empty, -1 where there is none.
    packed: whether they are to be parts of windows, which need labels that ended.
    Raises InputError where no row can be learnt, with the reasons.
    """
    longest = max(options.buckets) - longest_prompt(tokens)
    reason_of = cache(lambda language: language_reason(language, tokens))
    column = utterances.columns.language
    languages = utterances.column(column) if column else [None] * len(utterances)
    default = utterances.config.language or options.language
    speech = speech_rows(utterances) & ~((lengths == 0) & (options.target == "text"))
    ended = utterances.column("ended") if packed else [True] * len(utterances)
    usable, left_out = np.ones(len(utterances), bool), {}
    for row in range(len(utterances)):
        reason = None
        if speech[row] and lengths[row] < 0:
            reason = f"no {options.target} to learn"
        elif speech[row] and lengths[row] > longest:
            reason = f"over {longest} tokens, which is all that a label bucket holds"
        elif speech[row] and not cell_bool(ended[row]):
            reason = "a label that was cut, which cannot be packed with others"
        elif speech[row] or options.non_speech == "end":
            reason = reason_of(languages[row] or default)
        if reason is not None:
            usable[row] = False
            left_out.setdefault(reason, []).append(int(row))
    found = LearnableRows(
        np.flatnonzero(usable & speech), np.flatnonzero(usable & ~speech), left_out
    )
    log_left_out(found, utterances)
    return found


def speech_rows(utterances: Utterances) -> Bool[np.ndarray, "n"]:
    """Whether each row is said to hold speech."""
    if not utterances.config.speech:
        return np.zeros(len(utterances), bool)
    return np.array([cell_bool(value) for value in utterances.column("speech")], bool)


def log_left_out(rows: LearnableRows, utterances: Utterances) -> None:
    """Log what is left out. Raises InputError where nothing is left."""
    source, count = utterances.config.source, len(utterances)
    out = describe_left_out(rows.left_out, lambda row: utterances[row].id)
    if not len(rows.speech) + len(rows.non_speech):
        raise InputError(f"none of the {count} rows of {source} can be learnt: {out}")
    if rows.left_out:
        number = sum(map(len, rows.left_out.values()))
        log.warning("%s: %d of %d rows are left out: %s", source, number, count, out)


def describe_left_out(left_out: dict[str, list[int]], name: Callable[[int], str]) -> str:
    """Each reason with its number of rows and the first of them by `name`."""
    return "; ".join(
        f"{why} ({len(rows)}, first {name(rows[0])})" for why, rows in left_out.items()
    )
