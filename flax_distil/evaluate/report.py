"""The report of an evaluation: tables for the terminal, Markdown, JSON and one HTML file."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from flax_distil.config import EvaluateConfig
from flax_distil.distill.tracking import METRICS, read_metrics
from flax_distil.evaluate.latency import Latency
from flax_distil.evaluate.results import ClipResult, Results
from flax_distil.evaluate.scores import Difference, Interval, Scored, Scores
from flax_distil.evaluate.tables import ReportTable, all_tables, error_parts
from flax_distil.files import write_whole
from flax_distil.terminal import print_table


class WorstClip(NamedTuple):
    """A clip on which the models differ: its result and error rate (percent) by model."""

    results: Mapping[str, ClipResult]
    rates: Mapping[str, float]
    waveform: np.ndarray | None = None
    """At 16 kHz."""


class Curve(NamedTuple):
    """Error rates against a value that was varied: panel → line → value and error rate."""

    value: str
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]]


@dataclass(frozen=True)
class Report:
    """All results, as they are printed and written."""

    models: list[dict[str, Any]]
    """Name, source, parameters and scores of each model."""
    tables: list[ReportTable]
    settings: dict[str, Any]
    """Device, precision, versions, command and so on."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Dataset → skipped clips with the reasons."""
    worst: Sequence[WorstClip] = ()
    recipe: str = ""
    """The options as TOML."""
    losses: Sequence[Mapping[str, Any]] = ()
    """The lines of a training run's metrics."""
    title: str = ""
    """By default the names of the models."""
    curves: Sequence[Curve] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "models": self.models,
            "tables": {
                one.name: [{title: plain(cell) for title, cell in row.items()} for row in one.rows]
                for one in self.tables
            },
            "skipped": self.skipped,
            "settings": self.settings,
        }

    def to_markdown(self) -> str:
        """The content of report.md."""
        parts = []
        for one in self.tables:
            parts += [f"## {one.title}", markdown_table(one), one.note]
        if self.worst:
            parts += ["## Clips that differ most", self._worst_markdown()]
        parts += ["## Settings", "\n".join(f"- {k}: {v}" for k, v in self.settings.items())]
        if self.skipped:
            parts.append("## Skipped clips")
        for dataset, reasons in self.skipped.items():
            lines = [f"- {reason}" for reason in reasons[:20]]
            lines += [f"- and {len(reasons) - 20} more"] if len(reasons) > 20 else []
            parts += [f"{dataset}: {len(reasons)}", "\n".join(lines)]
        return "\n\n".join(filter(None, parts)) + "\n"

    def _worst_markdown(self) -> str:
        lines = []
        for one in self.worst:
            first = next(iter(one.results.values()))
            lines.append(f"- {first.id}, reference: {first.reference}")
            for model, result in one.results.items():
                lines.append(f"  - {model} ({one.rates[model]:.0f} %): {result.text}")
        return "\n".join(lines)

    def print(self, console: Console | None = None) -> None:
        """Print the tables."""
        console = console or Console()
        for one in self.tables:
            headings = [column.title for column in one.columns]
            print_table(headings, one.texts(), one.keys, one.title, console)
        for dataset, reasons in self.skipped.items():
            line = f"{dataset}: {len(reasons)} clips skipped, the first: {reasons[0]}"
            console.print(line, markup=False, highlight=False)

    def save(self, folder: Path, name: str = "report") -> None:
        """Write report.json, report.md and report.html, or files of another name."""
        from flax_distil.evaluate.html import to_html

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        for kind, contents in (
            ("json", text),
            ("md", self.to_markdown()),
            ("html", to_html(self)),
        ):  # names of datasets may be paths, which may hold any bytes
            write_whole(folder / f"{name}.{kind}", contents.encode(errors="backslashreplace"))


def make_report(
    config: EvaluateConfig,
    models: Mapping[str, tuple[str, int]],
    sets: Mapping[str, tuple[str | None, bool]],
    results: Results,
    skipped: Mapping[str, list[str]],
    latency: Sequence[Latency],
) -> Report:
    """The report of these results. models: source and parameters by name. sets: by name, the
    group, and whether effective robustness is measured against it."""
    scores = Scores.of(config, {n: size for n, (_, size) in models.items()}, results, sets)
    return Report(
        models=[model_scores(scores, name, source) for name, (source, _) in models.items()],
        tables=all_tables(scores, latency),
        settings=settings(config),
        skipped={name: reasons for name, reasons in skipped.items() if reasons},
        worst=worst_clips(scores, config.worst),
        losses=read_metrics(config.run / METRICS) if config.run else (),
    )


def model_scores(scores: Scores, name: str, source: str) -> dict[str, Any]:
    """One model over all short clips, or all recordings where there are no short ones."""
    test = "short" if scores.of_test("short") else "long"
    parts = [one for one in scores.of_test(test) if name in one.clips]
    rate, difference = scores.averages(parts).get(name, (None, None))
    return {
        "name": name,
        "source": source,
        "parameters": scores.models[name],
        "wer": scores.average(parts, name),
        "interval": plain(rate),
        "difference": plain(difference),
        "rtf": scores.rtf(name, test),
        "relative_speed": scores.relative_speed(name, test),
        "language": scores.same_language(name),
        "datasets": [dataset_scores(one, name) for one in parts],
    }


def dataset_scores(part: Scored, model: str) -> dict[str, Any]:
    """One model on one dataset."""
    counts = part.total(model)
    substitutions, deletions, insertions = error_parts(counts)
    return {
        "name": part.part.dataset,
        "test": part.part.test,
        "setting": part.part.setting,
        "wer": 100 * counts.rate,
        "rate": part.units,
        "substitutions": substitutions,
        "deletions": deletions,
        "insertions": insertions,
        "reference_words": counts.reference_words,
        "clips": len(part.clips[model]),
        "audio_seconds": part.audio_seconds,
        "seconds": part.seconds(model),
        "rtf": part.seconds(model) / part.audio_seconds,
    }


def worst_clips(scores: Scores, count: int) -> list[WorstClip]:
    """The short clips on which the models' error rates differ most; of one model, those with the
    highest."""
    clips = []
    for part in scores.of_test("short"):
        for number in range(len(next(iter(part.clips.values())))):
            rates = {name: 100 * some[number].rate for name, some in part.counts.items()}
            gap = max(rates.values()) - (min(rates.values()) if len(rates) > 1 else 0)
            if gap > 0:
                results = {name: some[number] for name, some in part.clips.items()}
                clips.append((gap, WorstClip(results, rates)))
    return [one for _, one in sorted(clips, key=lambda pair: -pair[0])[:count]]


def settings(config: EvaluateConfig) -> dict[str, Any]:
    """What was measured, on what and with which versions."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "precision": config.dtype,
        "batch size": config.batch_size,
        "timed passes": config.passes,
        "longest transcript": f"{config.max_tokens} tokens",
        "search": "greedy, without timestamps; recordings with Whisper's defaults",
        "versions": f"flax-distil {version('flax-distil')}, jax {version('jax')}",
    }


def plain(cell: Any) -> Any:
    """A cell as JSON holds it."""
    return cell._asdict() if isinstance(cell, Interval | Difference) else cell


def markdown_table(table: ReportTable) -> str:
    """A table in Markdown; numbers are aligned right."""
    heads = [column.title for column in table.columns]
    marks = ["---:" if column.format else "---" for column in table.columns]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, marks, *table.texts())]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
