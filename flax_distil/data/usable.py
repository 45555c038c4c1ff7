"""Which rows of a dataset can be learnt, and why the others cannot.

A row never ends a run: one in a language that the checkpoint lacks, without a label or with a label
that no bucket holds is left out and counted, by the same rules for datasets, streams and labelling.
"""

import logging
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Int

from flax_distil.data.batches import TargetOptions, has_speech, longest_prompt
from flax_distil.data.table import cell_bool
from flax_distil.data.utterances import Utterance, Utterances
from flax_distil.errors import InputError
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)


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
) -> tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]:
    """The rows that can be learnt, with speech and without; the others are counted in the log.

    lengths: tokens of each row's target; 0 where it is empty, -1 where there is none.
    packed: whether rows become parts of windows, which need complete labels.

    Raises:
        InputError: no row can be learnt; the message gives the reasons.
    """
    longest = max(options.buckets) - longest_prompt(tokens)
    reason_of = cache(lambda language: language_reason(language, tokens))
    default = utterances.config.language or options.language
    flags = utterances.column("speech") if utterances.config.speech else [False] * len(lengths)
    speech = np.array([cell_bool(flag) for flag in flags], bool)
    speech &= (lengths != 0) | (options.target != "text")
    ended = [not packed or cell_bool(value) for value in utterances.column("ended")]
    left_out: dict[str, list[int]] = {}
    for row, language in enumerate(utterances.column(utterances.columns.language)):
        reason = None
        if speech[row] and lengths[row] < 0:
            reason = f"no {options.target} to learn"
        elif speech[row] and lengths[row] > longest:
            reason = f"over {longest} tokens, which is all that a label bucket holds"
        elif speech[row] and not ended[row]:
            reason = "a label that was cut, which cannot be packed with others"
        elif speech[row] or options.non_speech == "end":
            reason = reason_of(language or default)
        if reason is not None:
            left_out.setdefault(reason, []).append(row)
    usable = np.ones(len(utterances), bool)
    usable[[row for rows in left_out.values() for row in rows]] = False
    if left_out:
        source, count = utterances.config.source, len(utterances)
        reasons = "; ".join(
            f"{why} ({len(rows)}, first {utterances[rows[0]].id})" for why, rows in left_out.items()
        )
        if not usable.any():
            raise InputError(f"none of the {count} rows of {source} can be learnt: {reasons}")
        log.warning("%s: %d of %d rows are left out: %s", source, (~usable).sum(), count, reasons)
    return np.flatnonzero(usable & speech), np.flatnonzero(usable & ~speech)
