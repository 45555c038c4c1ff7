"""Criteria that drop a label, in the order in which they are tried (paper section 3.2).

WER comes last: so the other criteria drop the same rows at every WER threshold, and thresholds can
be compared.
"""

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from flax_distil.config import FilterConfig
from flax_distil.data.utterances import UTTERANCE_NUMBER
from flax_distil.errors import InputError
from flax_distil.pseudo_label.store import error_rates, read_settings, shard_files
from flax_distil.text.wer import error_rate

KEPT = "kept"
REASONS: tuple[str, ...] = (
    "non-speech",
    "no reference",
    "empty reference",
    "too long",
    "too many tokens",
    "not ended",
    "low log-probability",
    "high compression ratio",
    "no-speech probability",
    "all capitals",
    "disagreement",
    "WER of a part",
    "WER",
)
OF_ANY_CLIP = ("non-speech", "too long")  # the others need a label, which non-speech does not have
LARGE = ("audio", "teacher_states")  # columns that no criterion looks at


@dataclass(frozen=True)
class Measures:
    """What the criteria look at, for the rows of one shard."""

    speech: Bool[np.ndarray, "n"]
    referenced: Bool[np.ndarray, "n"]
    errors: Int[np.ndarray, "n"]
    words: Int[np.ndarray, "n"]
    seconds: Float[np.ndarray, "n"]
    tokens: Int[np.ndarray, "n"]
    log_probability: Float[np.ndarray, "n"]
    ended: Bool[np.ndarray, "n"]
    compression: Float[np.ndarray, "n"]
    no_speech: Float[np.ndarray, "n"]
    capitals: Bool[np.ndarray, "n"]
    """Whether all letters of the label are capitals, in a script that has small letters."""
    disagreement: Float[np.ndarray, "n"]
    """Error rate against the other teacher's label, in percent: 0 without another teacher, infinite
    where it has no label for the clip."""
    worst_part: Float[np.ndarray, "n"]
    """Highest error rate of a window's parts, in percent; 0 where no parts are known."""
    rates: tuple[str, ...]
    """WER, CER or both: the units of errors and words."""


def measure(path: Path, config: FilterConfig) -> Measures:
    """The measures of a shard's rows. Raises InputError when the shard is damaged.

    Columns that older stores lack count as: speech, ended, errors in words, no parts known.
    """
    table = read_shard(path, without=LARGE)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    tokens = pc.list_value_length(columns["token_ids"])  # type: ignore[attr-defined]

    def numbers(column: pa.ChunkedArray) -> np.ndarray:
        return column.fill_null(0).to_numpy()

    def flags(name: str) -> np.ndarray:
        column = columns.get(name)
        return np.ones(len(table), bool) if column is None else column.fill_null(True).to_numpy()

    def rows(name: str) -> list:
        return columns[name].to_pylist() if name in columns else [None] * len(table)

    parts = zip(rows("part_errors"), rows("part_words"), strict=True)
    return Measures(
        speech=flags("speech"),
        referenced=columns["reference_words"].is_valid().to_numpy(),
        errors=numbers(columns["word_errors"]),
        words=numbers(columns["reference_words"]),
        seconds=numbers(columns["duration"]),
        tokens=numbers(tokens),
        log_probability=numbers(columns["mean_log_probability"]),
        ended=flags("ended"),
        compression=numbers(columns["compression_ratio"]),
        no_speech=numbers(columns["no_speech_probability"]),
        capitals=np.array([all_capitals(text or "") for text in rows("whisper_transcript")], bool),
        disagreement=disagreements(table, path, config),
        worst_part=np.array([worst(*part) for part in parts], float),
        rates=tuple(error_rates(table)),
    )


def worst(errors: list[int] | None, words: list[int] | None) -> float:
    """The highest error rate of a window's parts, in percent; 0 where no parts are known."""
    pairs = zip(errors or (), words or (), strict=True)
    return max((100 * wrong / size for wrong, size in pairs if size), default=0.0)


def all_capitals(text: str) -> bool:
    """Whether all letters are capitals, of those that could be small (as in the published code)."""
    return text.upper() == text != text.lower()


def disagreements(table: pa.Table, path: Path, config: FilterConfig) -> Float[np.ndarray, "n"]:
    """Error rate in percent of each label against the other teacher's; see `Measures`."""
    if config.agree_with is None:
        return np.zeros(len(table))
    unit = read_settings(config.source).get("error_rate", "auto")
    clip = itemgetter(UTTERANCE_NUMBER, "id")  # a split window has several rows of one number
    other = shard_files(config.agree_with).get(int(path.stem))
    rows = [] if other is None else _texts(read_shard(other, without=LARGE))
    theirs = {clip(row): row["whisper_transcript"] for row in rows}
    percent = np.full(len(table), np.inf)
    for place, row in enumerate(_texts(table)):
        if (text := theirs.get(clip(row))) is not None:
            rate = error_rate(row["language"], unit)
            percent[place] = 100 * rate.count([text], [row["whisper_transcript"]]).rate
    return percent


def _texts(table: pa.Table) -> list[dict[str, Any]]:
    names = [UTTERANCE_NUMBER, "id", "whisper_transcript", "language"]
    return table.select(names).to_pylist()


def decide(measures: Measures, config: FilterConfig) -> np.ndarray:
    """For each row "kept", or the first reason to drop it."""
    none = np.zeros(len(measures.words), bool)

    def above(values: np.ndarray, most: float | None) -> np.ndarray:
        return none if most is None else values > most

    def at_least(values: np.ndarray, limit: float | None) -> np.ndarray:
        return none if limit is None else values >= limit

    least, by_wer = config.min_mean_log_probability, config.max_wer is not None
    dropped = {
        "non-speech": none if config.keep_non_speech else ~measures.speech,
        "no reference": none if decides_without_reference(config) else ~measures.referenced,
        "empty reference": measures.referenced & (measures.words == 0) if by_wer else none,
        "too long": measures.seconds > config.max_duration,
        "too many tokens": measures.tokens > config.max_label_tokens,
        "not ended": none if config.keep_unended else ~measures.ended,
        "low log-probability": none if least is None else measures.log_probability < least,
        "high compression ratio": above(measures.compression, config.max_compression_ratio),
        "no-speech probability": above(measures.no_speech, config.max_no_speech_probability),
        "all capitals": none if config.keep_all_caps else measures.capitals,
        "disagreement": at_least(
            measures.disagreement, config.agree_with and config.max_disagreement
        ),
        "WER of a part": at_least(measures.worst_part, config.max_part_wer),
        "WER": none if config.max_wer is None else exceeds(measures, config.max_wer),
    }
    rows = [
        dropped[reason] if reason in OF_ANY_CLIP else dropped[reason] & measures.speech
        for reason in REASONS
    ]
    return np.select(rows, REASONS, KEPT)


def exceeds(measures: Measures, max_wer: float) -> Bool[np.ndarray, "n"]:
    """Whether WER ≥ `max_wer` percent, without rounding; False without a reference."""
    return measures.referenced & (100 * measures.errors >= max_wer * measures.words)


def decides_without_reference(config: FilterConfig) -> bool:
    """Whether the configuration says what to do with labels that have no reference."""
    return (
        config.allow_missing_reference
        or config.max_wer is None
        or config.min_mean_log_probability is not None
        or config.max_compression_ratio is not None
        or config.agree_with is not None
    )


def read_shard(path: Path, without: tuple[str, ...] = ()) -> pa.Table:
    """A shard, without some of its columns. Raises InputError when it is damaged."""
    try:
        names = [name for name in pq.read_schema(path).names if name not in without]
        return pq.read_table(path, columns=names, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): run pseudo-label --verify to make it again"
        ) from None
