"""Which rows of a dataset can be learnt, and why the others cannot.

A row never ends a run: one in a language that the checkpoint lacks, without a label or with a label
that no bucket holds is left out and counted, by the same rules for datasets, streams and labelling.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from flax_distil.data.batches import TargetOptions, has_speech, longest_prompt
from flax_distil.data.table import cell_bool
from flax_distil.data.utterances import Utterance, Utterances
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnableRows:
    """The rows of a dataset that can be learnt, and the others by reason."""

    speech: Int[np.ndarray, "n"]
    non_speech: Int[np.ndarray, "m"]
    """Rows without speech."""
    left_out: dict[str, list[int]]


def language_reason(language: str | None, tokens: WhisperTokens) -> str | None:
    """Why a checkpoint cannot learn a language; None where it can."""
    if language is None and tokens.multilingual:
        return "no language is named"
    return tokens.unsupported(language)


def not_learnable(
    utterance: Utterance, options: TargetOptions, tokens: WhisperTokens
) -> str | None:
    """Why an utterance has nothing to learn for this checkpoint; None where it has."""
    speech = has_speech(utterance, options.target)
    if speech and not has_target(utterance, options.target):
        return f"no {options.target} to learn"
    if speech or options.non_speech == "end":
        return language_reason(utterance.language or options.language, tokens)
    return None


def has_target(utterance: Utterance, target: Literal["label", "text"]) -> bool:
    """Whether there is a label or text; of a window, for all its parts with speech."""
    parts = [one for one in utterance.parts or (utterance,) if has_speech(one, target)]
    if target == "text":
        return all(part.text is not None for part in parts)
    return all((part.token_ids, part.transcript) != (None, None) for part in parts)


def usable_rows(
    utterances: Utterances,
    lengths: Int[np.ndarray, "n"],
    options: TargetOptions,
    tokens: WhisperTokens,
    packed: bool = False,
) -> LearnableRows:
    """The rows that can be learnt; the others are logged.

    lengths: tokens of each row's target; 0 where it is empty, -1 where there is none.
    packed: whether rows become parts of windows, which need complete labels.

    Raises:
        InputError: no row can be learnt; the message gives the reasons.
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
            left_out.setdefault(reason, []).append(row)
    rows = LearnableRows(
        np.flatnonzero(usable & speech), np.flatnonzero(usable & ~speech), left_out
    )
    if left_out:
        source, count = utterances.config.source, len(utterances)
        reasons = describe_left_out(left_out, lambda row: utterances[row].id)
        if not usable.any():
            raise InputError(f"none of the {count} rows of {source} can be learnt: {reasons}")
        log.warning("%s: %d of %d rows are left out: %s", source, (~usable).sum(), count, reasons)
    return rows


def speech_rows(utterances: Utterances) -> Bool[np.ndarray, "n"]:
    """Whether each row holds speech."""
    if not utterances.config.speech:
        return np.zeros(len(utterances), bool)
    return np.array([cell_bool(value) for value in utterances.column("speech")], bool)


def describe_left_out(left_out: dict[str, list[int]], name: Callable[[int], str]) -> str:
    """Each reason with its number of rows and the first of them by `name`."""
    return "; ".join(
        f"{why} ({len(rows)}, first {name(rows[0])})" for why, rows in left_out.items()
    )
