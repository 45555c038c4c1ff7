"""Keep the labels that are likely to be right (paper section 3.2 and table 10)."""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.config import FilterConfig
from flax_distil.errors import InputError, check_writable
from flax_distil.pseudo_label.criteria import (
    KEPT,
    REASONS,
    Measures,
    decide,
    decides_without_reference,
    exceeds,
    measure,
    read_shard,
)
from flax_distil.pseudo_label.store import (
    SETTINGS,
    LabelStore,
    as_json,
    open_store,
    read_settings,
    shard_files,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """Totals over some of the labels."""

    labels: int = 0
    seconds: float = 0.0
    errors: int = 0
    words: int = 0

    def plus(self, measures: Measures, rows: Bool[np.ndarray, "n"]) -> "Totals":
        """These totals and those of more rows."""
        return Totals(
            self.labels + int(rows.sum()),
            self.seconds + float(measures.seconds[rows].sum()),
            self.errors + int(measures.errors[rows].sum()),
            self.words + int(measures.words[rows].sum()),
        )

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return self.seconds / 3600

    @property
    def wer(self) -> float | None:
        """Error rate against the references, in percent."""
        return 100 * self.errors / self.words if self.words else None


@dataclass(frozen=True)
class Threshold:
    """A row of the table: the labels that would be kept with this λ."""

    max_wer: float
    kept: int
    dropped_percent: float
    hours: float
    wer: float | None
    """Percent, of the kept labels against their references."""


@dataclass(frozen=True)
class FilterReport:
    """What was kept and dropped; the contents of filter.json."""

    labels: int
    hours: float
    wer: float | None
    """Percent, of all labels against their references."""
    kept: int
    non_speech: int
    """Clips without speech among those kept."""
    kept_hours: float
    kept_wer: float | None
    dropped: dict[str, int]
    """Reason → number of labels."""
    table: tuple[Threshold, ...]
    rate: str = "WER"
    """WER, CER or WER/CER: the unit of the error rates."""


def run(config: FilterConfig) -> FilterReport:
    """Write the reliable labels of `config.source` to `config.output_dir`; prints why others go.

    A folder with several stores becomes a folder with a filtered store for each.

    Raises InputError when there are labels without a reference and no criterion for them, when
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
    """A configuration for each label store in `source`, or for `source` itself if it is one."""
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


def measure_all(parts: Sequence[FilterConfig], files: Sequence[list[Path]]) -> FilterReport:
    """The report over the files of each store, read without audio; writes nothing.

    Raises InputError for labels without a reference where no criterion applies to them.
    """
    config, whole, kept = parts[0], Totals(), Totals()
    extra = () if config.max_wer is None else (config.max_wer,)
    at = {threshold: Totals() for threshold in sorted({*config.thresholds, *extra})}
    dropped = dict.fromkeys(REASONS, 0)
    missing, non_speech, rates = 0, 0, set()
    pairs = [(path, part) for part, own in zip(parts, files, strict=True) for path in own]
    for path, part in tqdm(pairs, desc="measuring", leave=False):
        measures = measure(path, part)
        missing += int((measures.speech & ~measures.referenced).sum())
        rates.update(measures.rates)
        decisions = decide(measures, config)
        keep = decisions == KEPT
        non_speech += int((keep & ~measures.speech).sum())
        whole = whole.plus(measures, np.ones(len(decisions), bool))
        kept = kept.plus(measures, keep)
        for reason in REASONS:
            dropped[reason] += int((decisions == reason).sum())
        for threshold, totals in at.items():
            below = (keep | (decisions == "WER")) & ~exceeds(measures, threshold)
            at[threshold] = totals.plus(measures, below)
    if missing and not decides_without_reference(config):
        raise InputError(
            f"{missing} of {whole.labels} labels have no reference, so their WER is unknown: "
            "filter by --min-mean-log-probability, --max-compression-ratio or --agree-with, "
            "or keep them all with --allow-missing-reference"
        )
    table = [
        Threshold(
            max_wer=threshold,
            kept=totals.labels,
            dropped_percent=100 * (1 - totals.labels / max(whole.labels, 1)),
            hours=totals.hours,
            wer=totals.wer,
        )
        for threshold, totals in at.items()
    ]
    return FilterReport(
        labels=whole.labels,
        hours=whole.hours,
        wer=whole.wer,
        kept=kept.labels,
        non_speech=non_speech,
        kept_hours=kept.hours,
        kept_wer=kept.wer,
        dropped=dropped,
        table=tuple(table) if whole.words else (),
        rate="/".join(sorted(rates, reverse=True)) or "WER",
    )


def report_table(report: FilterReport, config: FilterConfig) -> Table:
    """Labels dropped for each reason, then those kept at each threshold (paper table 10)."""
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
        table.add_row("  of these non-speech", f"{report.non_speech:,}")
    table.add_section()
    for line in report.table:
        mark = " ←" if line.max_wer == config.max_wer else ""
        name = f"{rate} < {line.max_wer:g} %{mark}"
        row(name, line.kept, line.dropped_percent, line.hours, line.wer)
    return table


def _write(config: FilterConfig, report: FilterReport) -> None:
    """Write the kept labels as a store, in place of an older one; shards keep their numbers."""
    partial = config.output_dir.with_name(config.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    store = open_store(partial, read_settings(config.source) | {"filter": _criteria(config)})
    shards = []
    for number, path in tqdm(shard_files(config.source).items(), desc="writing", leave=False):
        keep = decide(measure(path, config), config) == KEPT
        if keep.any():
            shards.append(store.write_table(number, read_shard(path).filter(pa.array(keep))))
    store.write_index(shards, complete=True)
    store.write_file("filter.json", as_json(dataclasses.asdict(report)))
    if config.output_dir.exists():
        shutil.rmtree(config.output_dir)
    partial.replace(config.output_dir)


def _criteria(config: FilterConfig) -> dict[str, Any]:
    criteria = dataclasses.asdict(config)
    for name in ("source", "output_dir", "thresholds", "overwrite"):
        del criteria[name]
    return criteria | {"agree_with": config.agree_with and str(config.agree_with)}


def _check_folders(config: FilterConfig) -> None:
    ours = read_settings(config.source)
    theirs = read_settings(config.agree_with) if config.agree_with else ours
    for name in ("data", "utterances", "shard_size", "pack_seconds", "pack_pause"):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{config.agree_with} cannot be compared with {config.source}: {name} is "
                f"{theirs.get(name)!r} there and {ours.get(name)!r} here"
            )
    check_writable(config.output_dir)
    if config.output_dir.resolve() == config.source.resolve():
        raise InputError("source and output_dir are the same folder: choose another output_dir")
    used = config.output_dir.exists() and any(config.output_dir.iterdir())
    if used and not config.overwrite:
        raise InputError(
            f"{config.output_dir} is in use: choose another output_dir, or add --overwrite"
        )
    if used and not (config.output_dir / "filter.json").exists():
        raise InputError(
            f"{config.output_dir} does not hold an earlier result of filter: it is not overwritten"
        )
    if not LabelStore(config.source, {}).complete():
        logger.warning("%s is not complete: labelling was stopped", config.source)
