"""Criteria that drop a label, in the order in which they are tried (paper section 3.2).

WER comes last: so the other criteria drop the same rows at every WER threshold, and thresholds can
be compared.
"""

# pandas' own annotations are too wide for pyright.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from jaxtyping import Bool, Float

from flax_distil.config import FilterConfig
from flax_distil.pseudo_label.store import read_settings, read_shard, shard_files
from flax_distil.text.wer import error_rate

KEPT, HOURS = "kept", "hours"
OF_ANY_CLIP = ("non-speech", "too long")  # the others need a label, which non-speech does not have
CLIP = ["utterance_number", "id"]  # a split window has several rows of one number
TEXTS = [*CLIP, "whisper_transcript", "language"]
COLUMNS = [*TEXTS, "token_ids", "duration", "mean_log_probability", "compression_ratio"]
COLUMNS += ["no_speech_probability", "word_errors", "reference_words", "error_rate"]
COLUMNS += ["ended", "speech", "part_errors", "part_words"]


def measure(path: Path, config: FilterConfig) -> pd.DataFrame:
    """What the criteria look at: a row for each label of a shard, with the store's columns and

        tokens         length of the label
        capitals       whether all letters are capitals, in a script that has small letters
        disagreement   error rate in percent against the other teacher's label; infinite where it
                       has none for the clip
        worst_part     highest error rate of a window's parts, in percent; 0 where there are none

    Columns that older stores lack count as: speech, ended, errors in words, no parts. Raises
    InputError when the shard is damaged.
    """
    table = read_shard(path, COLUMNS)
    labels = table.drop_columns("token_ids").to_pandas()
    tokens = pc.list_value_length(table["token_ids"])  # type: ignore[attr-defined]
    parts = labels[["part_errors", "part_words"]].explode(["part_errors", "part_words"])
    parts = parts.astype(float)
    rates = 100 * parts["part_errors"] / parts["part_words"].replace(0, np.nan)
    units = labels["error_rate"].fillna("WER").where(labels["reference_words"].notna())
    return labels.assign(
        tokens=tokens.to_numpy(),
        ended=labels["ended"].fillna(True).astype(bool),
        speech=labels["speech"].fillna(True).astype(bool),
        error_rate=units,
        capitals=labels["whisper_transcript"].fillna("").map(all_capitals).astype(bool),
        disagreement=disagreements(labels, path, config),
        worst_part=rates.groupby(level=0).max().fillna(0.0),
    )


def all_capitals(text: str) -> bool:
    """Whether all letters are capitals, of those that could be small (as in the published code)."""
    return text.upper() == text != text.lower()


def disagreements(labels: pd.DataFrame, path: Path, config: FilterConfig) -> Float[np.ndarray, "n"]:
    """Error rate in percent of each label against the other teacher's; see `measure`."""
    percent = np.full(len(labels), np.inf)
    other = shard_files(config.agree_with).get(int(path.stem)) if config.agree_with else None
    if other is None:
        return percent
    unit = read_settings(config.source).get("error_rate", "auto")
    theirs = read_shard(other, TEXTS).to_pandas()
    pairs = labels[TEXTS].merge(theirs, "left", CLIP, suffixes=("", "_of_other"))
    for row, pair in enumerate(pairs.itertuples()):
        if isinstance(text := pair.whisper_transcript_of_other, str):
            rate = error_rate(pair.language, unit)
            percent[row] = 100 * rate.count([text], [pair.whisper_transcript]).rate
    return percent


def decide(labels: pd.DataFrame, config: FilterConfig) -> pd.Categorical:
    """For each row "kept", or the first reason to drop it; the categories are in that order."""

    def limit(value: float | None) -> float:
        return np.nan if value is None else value  # no number is above or below it

    speech, referenced = labels["speech"], labels["reference_words"].notna()
    most_disagreement = config.max_disagreement if config.agree_with else None
    least_probability = limit(config.min_mean_log_probability)
    dropped = {
        "non-speech": ~(speech | config.keep_non_speech),
        "no reference": ~(referenced | decides_without_reference(config)),
        "empty reference": (labels["reference_words"] == 0) & (config.max_wer is not None),
        "too long": labels["duration"] > config.max_duration,
        "too many tokens": labels["tokens"] > config.max_label_tokens,
        "not ended": ~(labels["ended"] | config.keep_unended),
        "low log-probability": labels["mean_log_probability"] < least_probability,
        "high compression ratio": labels["compression_ratio"] > limit(config.max_compression_ratio),
        "no-speech probability": labels["no_speech_probability"]
        > limit(config.max_no_speech_probability),
        "all capitals": labels["capitals"] & (not config.keep_all_caps),
        "disagreement": labels["disagreement"] >= limit(most_disagreement),
        "WER of a part": labels["worst_part"] >= limit(config.max_part_wer),
        "WER": exceeds(labels, limit(config.max_wer)),
    }
    rows = [
        dropped[reason] if reason in OF_ANY_CLIP else dropped[reason] & speech for reason in dropped
    ]
    return pd.Categorical(np.select(rows, list(dropped), KEPT), [*dropped, HOURS, KEPT])


def beyond_hours(labels: pd.DataFrame, config: FilterConfig) -> Bool[np.ndarray, "n"]:
    """Whether a kept label comes after `max_hours` of kept ones, in a random order of all labels.

    The order depends on `seed` and the number of labels alone, so that choices of other hours or
    criteria have most clips in common.
    """
    kept = (labels["decision"] == KEPT).to_numpy()
    order = np.random.default_rng(config.seed).permutation(len(labels))
    hours = np.empty(len(labels))
    hours[order] = np.cumsum(np.where(kept, labels["duration"].to_numpy(), 0.0)[order]) / 3600
    return kept & (hours > (np.inf if config.max_hours is None else config.max_hours))


def exceeds(labels: pd.DataFrame, max_wer: float) -> pd.Series:
    """Whether WER ≥ `max_wer` percent, without rounding; False without a reference."""
    return 100 * labels["word_errors"] >= max_wer * labels["reference_words"]


def decides_without_reference(config: FilterConfig) -> bool:
    """Whether the configuration says what to do with labels that have no reference."""
    others = (config.min_mean_log_probability, config.max_compression_ratio, config.agree_with)
    return (
        config.allow_missing_reference
        or config.max_wer is None
        or any(other is not None for other in others)
    )
