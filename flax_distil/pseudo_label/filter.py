"""Choose the labels that one can trust (paper section 3.2 and table 10).

A label is dropped for the first reason that holds, WER last. So the other reasons drop the same
rows at every threshold, and the row of the table at `max_wer` is what is written.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.config import FilterConfig
from flax_distil.data.utterances import UTTERANCE_NUMBER
from flax_distil.errors import InputError, check_writable
from flax_distil.pseudo_label.store import (
    SETTINGS,
    LabelStore,
    error_rates,
    open_store,
    read_settings,
    shard_files,
    write_json,
)
from flax_distil.text.wer import error_rate

logger = logging.getLogger(__name__)

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
OF_ANY_CLIP = ("non-speech", "too long")  # others judge a label, which non-speech has none of
MEASURED = (
    "word_errors",
    "reference_words",
    "duration",
    "token_ids",
    "mean_log_probability",
    "compression_ratio",
    "no_speech_probability",
    "whisper_transcript",
    "language",
    UTTERANCE_NUMBER,
    "id",
    "error_rate",
    "ended",
    "speech",
    "part_errors",
    "part_words",
)


@dataclass(frozen=True)
class Measures:
    """What filtering looks at, for the rows of one shard."""

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
    """Whether the label has letters, none of them small, in a script that has small ones."""
    disagreement: Float[np.ndarray, "n"]
    """Error rate against the other teacher's label, in percent: 0 where none is asked, infinite
    where it has none."""
    worst_part: Float[np.ndarray, "n"]
    """Highest error rate of a window's parts, in percent; 0 where no parts are known."""
    rates: tuple[str, ...]
    """WER, CER or both: what errors and words count."""


@dataclass
class Kept:
    """What is kept at one threshold: the sums that a row of the table is made of."""

    labels: int = 0
    seconds: float = 0.0
    errors: int = 0
    words: int = 0

    def add(self, measures: Measures, keep: Bool[np.ndarray, "n"]) -> None:
        """Count the rows of one more shard."""
        self.labels += int(keep.sum())
        self.seconds += float(measures.seconds[keep].sum())
        self.errors += int(measures.errors[keep].sum())
        self.words += int(measures.words[keep].sum())

    @property
    def wer(self) -> float | None:
        """Of what is kept, against its references, in percent."""
        return 100 * self.errors / self.words if self.words else None


@dataclass(frozen=True)
class Threshold:
    """A row of the table: filtering with this λ."""

    max_wer: float
    kept: int
    dropped_percent: float
    hours: float
    wer: float | None
    """Percent, of the kept labels against their references."""


@dataclass(frozen=True)
class FilterReport:
    """What filtering did."""

    labels: int
    hours: float
    wer: float | None
    """Percent, of all labels against their references."""
    kept: int
    non_speech: int
    """Of those kept."""
    kept_hours: float
    kept_wer: float | None
    dropped: dict[str, int]
    """How many were dropped for each reason."""
    table: tuple[Threshold, ...]
    rate: str = "WER"
    """WER, CER or both: what the error rates count."""


def run(config: FilterConfig) -> FilterReport:
    """Write the labels of `config.source` that can be trusted to `config.output_dir`, and say why.

    Of a folder with several stores each is filtered, into a folder of its name.
    Raises InputError when labels without a reference are there and nothing judges them, when
    nothing is kept, when a shard is damaged, or when the output folder is in use.
    """
    parts = by_store(config)
    for part in parts:
        _check_folders(part)
    files = [list(shard_files(part.source).values()) for part in parts]
    report = measure_all(parts, files)
    Console().print(report_table(report, config))
    if not report.kept:
        raise InputError(
            f"none of {report.labels} labels is kept: raise max_wer from {config.max_wer}, or see "
            "in the table what else drops them"
        )
    for part, inside in zip(parts, files, strict=True):
        of_part = report if len(parts) == 1 else measure_all([part], [inside])
        if of_part.kept:
            _write(part, of_part)
        else:
            logger.warning("none of %d labels of %s is kept", of_part.labels, part.source)
    return report


def by_store(config: FilterConfig) -> list[FilterConfig]:
    """A configuration for each label store in `source`, or for itself where it is one."""
    folders = sorted(path.parent for path in config.source.glob(f"*/{SETTINGS}"))
    if (config.source / SETTINGS).exists() or not folders:
        return [config]
    other = config.agree_with
    return [
        dataclasses.replace(
            config,
            source=folder,
            output_dir=config.output_dir / folder.name,
            agree_with=other and other / folder.name,
        )
        for folder in folders
    ]


def _write(config: FilterConfig, report: FilterReport) -> None:
    """The labels that are kept, as a whole store in the place of an older one."""
    partial = config.output_dir.with_name(config.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = read_settings(config.source) | {"filter": _criteria(config)}
    store = open_store(partial, settings)
    _write_kept(store, shard_files(config.source), config)
    write_json(partial / "filter.json", dataclasses.asdict(report))
    if config.output_dir.exists():
        shutil.rmtree(config.output_dir)
    partial.replace(config.output_dir)


def measure_all(parts: Sequence[FilterConfig], files: Sequence[list[Path]]) -> FilterReport:
    """The report over the files of each store, from the small columns alone; nothing is written.

    Raises InputError for labels without a reference that nothing judges.
    """
    config = parts[0]
    asked = () if config.max_wer is None else (config.max_wer,)
    thresholds = sorted({*config.thresholds, *asked})
    whole, chosen, at = Kept(), Kept(), {threshold: Kept() for threshold in thresholds}
    dropped = dict.fromkeys(REASONS, 0)
    missing, non_speech, rates = 0, 0, set()
    pairs = [(path, part) for part, own in zip(parts, files, strict=True) for path in own]
    for path, part in tqdm(pairs, desc="measuring", leave=False):
        measures = measure(path, part)
        missing += int((measures.speech & ~measures.referenced).sum())
        rates.update(measures.rates)
        verdicts = judge(measures, config)
        non_speech += int(((verdicts == KEPT) & ~measures.speech).sum())
        whole.add(measures, np.ones(len(verdicts), bool))
        chosen.add(measures, verdicts == KEPT)
        for reason in REASONS:
            dropped[reason] += int((verdicts == reason).sum())
        passing = (verdicts == KEPT) | (verdicts == "WER")
        for threshold, kept in at.items():
            kept.add(measures, passing & ~over(measures, threshold))
    if missing and not judges_unreferenced(config):
        raise InputError(
            f"{missing} of {whole.labels} labels have no reference, so their WER is not known: "
            "judge them by --min-mean-log-probability, --max-compression-ratio or --agree-with, "
            "or keep them all with --allow-missing-reference"
        )
    rows = tuple(
        Threshold(
            max_wer=threshold,
            kept=kept.labels,
            dropped_percent=100 * (1 - kept.labels / max(whole.labels, 1)),
            hours=kept.seconds / 3600,
            wer=kept.wer,
        )
        for threshold, kept in at.items()
    )
    return FilterReport(
        labels=whole.labels,
        hours=whole.seconds / 3600,
        wer=whole.wer,
        kept=chosen.labels,
        non_speech=non_speech,
        kept_hours=chosen.seconds / 3600,
        kept_wer=chosen.wer,
        dropped=dropped,
        table=rows if whole.words else (),
        rate="/".join(sorted(rates, reverse=True)) or "WER",
    )


def measure(path: Path, config: FilterConfig) -> Measures:
    """What filtering looks at in one shard. Raises InputError when the shard is damaged.

    Columns that older stores lack are taken as: speech, ended, words counted, no parts known.
    """
    table = _read(path, MEASURED)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    tokens = pc.list_value_length(columns["token_ids"])  # type: ignore[attr-defined]

    def numbers(column: pa.ChunkedArray) -> np.ndarray:
        return column.fill_null(0).to_numpy()

    def flags(name: str) -> np.ndarray:
        found = columns.get(name)
        return np.ones(len(table), bool) if found is None else found.fill_null(True).to_numpy()

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
    """Whether there are letters that could be small, and none is (as the published code asks)."""
    return text.upper() == text != text.lower()


def disagreements(table: pa.Table, path: Path, config: FilterConfig) -> Float[np.ndarray, "n"]:
    """Error rate in percent of each label against the other teacher's; see `Measures`."""
    if config.agree_with is None:
        return np.zeros(len(table))
    asked = read_settings(config.source).get("error_rate", "auto")
    theirs, names = {}, (UTTERANCE_NUMBER, "id", "whisper_transcript", "language")
    clip = itemgetter(UTTERANCE_NUMBER, "id")  # a window that was split has several of a number
    other = shard_files(config.agree_with).get(int(path.stem))
    if other is not None:
        theirs = {clip(row): row["whisper_transcript"] for row in _read(other, names).to_pylist()}
    found = np.full(len(table), np.inf)
    for place, row in enumerate(table.select(names).to_pylist()):
        if (text := theirs.get(clip(row))) is not None:
            rate = error_rate(row["language"], asked)
            found[place] = 100 * rate.count([text], [row["whisper_transcript"]]).rate
    return found


def judge(measures: Measures, config: FilterConfig) -> np.ndarray:
    """ "kept" or the first reason against it, for each row."""
    none = np.zeros(len(measures.words), bool)

    def beyond(values: np.ndarray, most: float | None) -> np.ndarray:
        return none if most is None else values > most

    least, by_wer = config.min_mean_log_probability, config.max_wer is not None
    against = {
        "non-speech": none if config.keep_non_speech else ~measures.speech,
        "no reference": none if judges_unreferenced(config) else ~measures.referenced,
        "empty reference": measures.referenced & (measures.words == 0) if by_wer else none,
        "too long": measures.seconds > config.max_duration,
        "too many tokens": measures.tokens > config.max_label_tokens,
        "not ended": none if config.keep_unended else ~measures.ended,
        "low log-probability": none if least is None else measures.log_probability < least,
        "high compression ratio": beyond(measures.compression, config.max_compression_ratio),
        "no-speech probability": beyond(measures.no_speech, config.max_no_speech_probability),
        "all capitals": none if config.keep_all_caps else measures.capitals,
        "disagreement": none
        if config.agree_with is None
        else measures.disagreement >= config.max_disagreement,
        "WER of a part": none
        if config.max_part_wer is None
        else measures.worst_part >= config.max_part_wer,
        "WER": none if config.max_wer is None else over(measures, config.max_wer),
    }
    for reason, rows in against.items():
        if reason not in OF_ANY_CLIP:
            against[reason] = rows & measures.speech
    return np.select([against[reason] for reason in REASONS], REASONS, KEPT)


def over(measures: Measures, max_wer: float) -> Bool[np.ndarray, "n"]:
    """Whether WER ≥ `max_wer` percent, without rounding; False where there is no reference."""
    return measures.referenced & (100 * measures.errors >= max_wer * measures.words)


def judges_unreferenced(config: FilterConfig) -> bool:
    """Whether anything decides about labels that have no reference."""
    return (
        config.allow_missing_reference
        or config.max_wer is None
        or config.min_mean_log_probability is not None
        or config.max_compression_ratio is not None
        or config.agree_with is not None
    )


def report_table(report: FilterReport, config: FilterConfig) -> Table:
    """The reasons, then what each threshold would keep, like the paper's table 10."""
    rate = report.rate
    table = Table("", "labels", "dropped %", "hours", f"{rate} %", title=f"{config.source}")

    def row(name: str, labels: int, dropped: float, hours: float | None, wer: float | None):
        shown = [f"{labels:,}", f"{dropped:.1f}"]
        shown += ["" if value is None else f"{value:.2f}" for value in (hours, wer)]
        table.add_row(name, *shown)

    row("all", report.labels, 0.0, report.hours, report.wer)
    for reason, count in report.dropped.items():
        if count:
            name = reason.replace("WER", rate)
            row(f"dropped: {name}", count, 100 * count / report.labels, None, None)
    dropped = 100 * (1 - report.kept / max(report.labels, 1))
    row("kept", report.kept, dropped, report.kept_hours, report.kept_wer)
    if report.non_speech:
        table.add_row("  of it non-speech", f"{report.non_speech:,}")
    table.add_section()
    for line in report.table:
        mark = " ←" if line.max_wer == config.max_wer else ""
        name = f"{rate} < {line.max_wer:g} %{mark}"
        row(name, line.kept, line.dropped_percent, line.hours, line.wer)
    return table


def _write_kept(store: LabelStore, files: dict[int, Path], config: FilterConfig) -> None:
    """One output shard for each shard that has anything to keep, under the same number."""
    shards = []
    for number, path in tqdm(files.items(), desc="writing", leave=False):
        keep = judge(measure(path, config), config) == KEPT
        if keep.any():
            shards.append(store.put(number, _read(path).filter(pa.array(keep))))
    store.write_index(shards, complete=True)


def _read(path: Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    """A shard, or those of `columns` that it has."""
    try:
        names = columns and [name for name in columns if name in pq.read_schema(path).names]
        return pq.read_table(path, columns=names, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): run pseudo-label --verify, which makes it anew"
        ) from None


def _criteria(config: FilterConfig) -> dict:
    chosen = dataclasses.asdict(config)
    for name in ("source", "output_dir", "thresholds", "overwrite"):
        del chosen[name]
    return chosen | {"agree_with": config.agree_with and str(config.agree_with)}


def _check_same_data(config: FilterConfig) -> None:
    """Raises InputError where the other teacher's labels are of other clips."""
    ours = read_settings(config.source)
    if config.agree_with is None:
        return
    theirs = read_settings(config.agree_with)
    for name in ("data", "utterances", "shard_size", "pack_seconds", "pack_pause"):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{config.agree_with} cannot judge {config.source}: {name} is {theirs.get(name)!r} "
                f"there and {ours.get(name)!r} here"
            )


def _check_folders(config: FilterConfig) -> None:
    _check_same_data(config)
    check_writable(config.output_dir)
    if config.output_dir.resolve() == config.source.resolve():
        raise InputError("source and output_dir are the same folder: take another output_dir")
    used = config.output_dir.exists() and any(config.output_dir.iterdir())
    if used and not config.overwrite:
        raise InputError(f"{config.output_dir} is in use: take another output_dir, or --overwrite")
    if used and not (config.output_dir / "filter.json").exists():
        raise InputError(
            f"{config.output_dir} holds no earlier result of filter: it is not overwritten"
        )
    if not LabelStore(config.source, {}).complete():
        logger.warning("%s is not complete: labelling was stopped", config.source)
