"""Keep the labels that are likely to be right (paper section 3.2 and table 10)."""

# pandas' own annotations are too wide for pyright.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.config import FilterConfig
from flax_distil.errors import InputError, check_writable
from flax_distil.pseudo_label import store as stores
from flax_distil.pseudo_label.criteria import (
    HOURS,
    KEPT,
    beyond_hours,
    decide,
    decides_without_reference,
    exceeds,
    measure,
)

logger = logging.getLogger(__name__)


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
        check_folders(part)
    labels = pd.concat([decisions(part).assign(store=n) for n, part in enumerate(parts)])
    labels.loc[beyond_hours(labels, config), "decision"] = HOURS
    missing = int((labels["speech"] & labels["reference_words"].isna()).sum())
    if missing and not decides_without_reference(config):
        raise InputError(
            f"{missing} of {len(labels)} labels have no reference, so their WER is unknown: "
            "filter by --min-mean-log-probability, --max-compression-ratio or --agree-with, "
            "or keep them all with --allow-missing-reference"
        )
    whole = report(labels, config)
    Console().print(report_table(whole, config))
    if not whole.kept:
        raise InputError(
            f"none of {whole.labels} labels is kept: raise max_wer from {config.max_wer}, or see "
            "in the table what else drops them"
        )
    for number, part in enumerate(parts):
        own = labels[labels["store"] == number]
        if (own["decision"] == KEPT).any():
            write_kept(part, own)
        else:
            logger.warning("none of %d labels of %s is kept", len(own), part.source)
    return whole


def by_store(config: FilterConfig) -> list[FilterConfig]:
    """A configuration for each label store in `source`, or for `source` itself if it is one."""
    folders = sorted(path.parent for path in config.source.glob(f"*/{stores.SETTINGS}"))
    if (config.source / stores.SETTINGS).exists() or not folders:
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


def check_folders(config: FilterConfig) -> None:
    """Raises InputError for a source or output folder that cannot be used."""
    ours = stores.read_settings(config.source)
    theirs = stores.read_settings(config.agree_with) if config.agree_with else ours
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
    if not stores.LabelStore(config.source).complete():
        logger.warning("%s is not complete: labelling was stopped", config.source)


def decisions(config: FilterConfig) -> pd.DataFrame:
    """For each label of a store: number of its shard, decision, and what is counted of it."""
    shards = []
    files = stores.shard_files(config.source)
    for number, path in tqdm(files.items(), desc="measuring", leave=False):
        labels = measure(path, config)
        counted = labels[["speech", "duration", "word_errors", "reference_words", "error_rate"]]
        shards.append(counted.assign(shard=number, decision=decide(labels, config)))
    return pd.concat(shards)


def report(labels: pd.DataFrame, config: FilterConfig) -> FilterReport:
    """The report over labels with their decisions."""

    def counts(rows: pd.DataFrame) -> tuple[int, float, float | None]:
        words, hours = rows["reference_words"].sum(), rows["duration"].sum() / 3600
        wer = float(100 * rows["word_errors"].sum() / words) if words else None
        return len(rows), float(hours), wer

    decision = labels["decision"]
    size, hours, wer = counts(labels)
    kept, kept_hours, kept_wer = counts(labels[decision == KEPT])
    extra = () if config.max_wer is None else (config.max_wer,)
    by_wer, table = labels[decision.isin([KEPT, HOURS, "WER"])], []
    for max_wer in sorted({*config.thresholds, *extra}) if wer is not None else ():
        below, its_hours, its_wer = counts(by_wer[~exceeds(by_wer, max_wer)])
        dropped_percent = 100 * (1 - below / size)
        table.append(Threshold(max_wer, below, dropped_percent, its_hours, its_wer))
    return FilterReport(
        labels=size,
        hours=hours,
        wer=wer,
        kept=kept,
        non_speech=int((~labels["speech"] & (decision == KEPT)).sum()),
        kept_hours=kept_hours,
        kept_wer=kept_wer,
        dropped={
            reason: int((decision == reason).sum()) for reason in decision.cat.categories.drop(KEPT)
        },
        table=tuple(table),
        rate="/".join(sorted(labels["error_rate"].dropna().unique(), reverse=True)) or "WER",
    )


def report_table(report: FilterReport, config: FilterConfig) -> Table:
    """Labels dropped for each reason, then those kept at each threshold (paper table 10)."""
    rate, size = report.rate, max(report.labels, 1)
    table = Table("", "labels", "dropped %", "hours", f"{rate} %", title=f"{config.source}")

    def row(name: str, labels: int, dropped: float, *hours_and_wer: float | None) -> None:
        shown = ["" if value is None else f"{value:.2f}" for value in hours_and_wer]
        table.add_row(name, f"{labels:,}", f"{dropped:.1f}", *shown)

    row("all", report.labels, 0.0, report.hours, report.wer)
    for reason, count in report.dropped.items():
        if count:
            row(f"dropped: {reason.replace('WER', rate)}", count, 100 * count / size)
    row("kept", report.kept, 100 * (1 - report.kept / size), report.kept_hours, report.kept_wer)
    if report.non_speech:
        table.add_row("  of these non-speech", f"{report.non_speech:,}")
    table.add_section()
    for line in report.table:
        mark = " ←" if line.max_wer == config.max_wer else ""
        name = f"{rate} < {line.max_wer:g} %{mark}"
        row(name, line.kept, line.dropped_percent, line.hours, line.wer)
    return table


def write_kept(config: FilterConfig, labels: pd.DataFrame) -> None:
    """Write the kept labels as a store, in place of an older one; shards keep their numbers."""
    partial = config.output_dir.with_name(config.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    settings = stores.read_settings(config.source) | {"filter": criteria(config)}
    store, files, shards = (
        stores.open_store(partial, settings),
        stores.shard_files(config.source),
        [],
    )
    for number, rows in tqdm(labels.groupby("shard"), desc="writing", leave=False):
        keep = (rows["decision"] == KEPT).to_numpy()
        if keep.any():
            table = stores.read_shard(files[number]).filter(pa.array(keep))
            shards.append(store.write_table(number, table))
    store.write_index(shards, complete=True)
    contents = stores.as_json(dataclasses.asdict(report(labels, config)))
    store.write_file("filter.json", contents)
    if config.output_dir.exists():
        shutil.rmtree(config.output_dir)
    partial.replace(config.output_dir)


def criteria(config: FilterConfig) -> dict[str, Any]:
    """The fields that decide what is kept, as the settings hold them."""
    fields = dataclasses.asdict(config)
    for name in ("source", "output_dir", "thresholds", "overwrite"):
        del fields[name]
    return fields | {"agree_with": config.agree_with and str(config.agree_with)}
