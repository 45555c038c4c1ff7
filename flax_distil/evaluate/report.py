"""The results of an evaluation: a table for the terminal, Markdown and JSON.

Error rates are percent of the reference's words, as in the papers, or of its characters for
languages without spaces between words; columns and `rate` say which. RTF, the real-time factor, is
processing time over audio time. Relative speed is the first model's time over this one's: 2.0 is
twice as fast.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flax_distil.text.wer import ErrorCounts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_COLUMNS = (0, 2)  # of the report's table: model and dataset


@dataclass(frozen=True)
class ClipResult:
    """One model on one clip: a line of transcripts.jsonl."""

    dataset: str
    id: str
    model: str
    language: str
    duration: float
    reference: str
    text: str
    wer: float
    """Percent, both texts normalised."""
    mean_log_probability: float
    compression_ratio: float
    rate: str = "WER"
    """WER or CER: the unit of `wer`."""


@dataclass(frozen=True)
class DatasetResult:
    """One model on one dataset."""

    name: str
    clips: int
    audio_seconds: float
    seconds: float
    """Processing time from waveforms to texts, without loading and compilation."""
    words: ErrorCounts
    characters: ErrorCounts | None = None
    rate: str = "WER"
    """WER, CER, or WER/CER for clips of both: the unit of `words`."""

    @property
    def wer(self) -> float:
        """Error rate in percent, in the unit of `rate`."""
        return 100 * self.words.rate

    @property
    def cer(self) -> float | None:
        """Character error rate in percent, if it was asked for."""
        return None if self.characters is None else 100 * self.characters.rate

    @property
    def rtf(self) -> float:
        """Processing time over audio time."""
        return self.seconds / self.audio_seconds

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        keys = ("name", "wer", "rate", "cer", "rtf", "clips", "audio_seconds", "seconds")
        return {key: getattr(self, key) for key in keys} | asdict(self.words)


@dataclass(frozen=True)
class ModelResult:
    """One model over all datasets."""

    name: str
    source: str
    parameters: int
    relative_speed: float
    """Median over batches of the first model's time over this one's."""
    datasets: tuple[DatasetResult, ...]

    @property
    def wer(self) -> float:
        """Mean of the datasets' error rates in percent (the paper's macro-average)."""
        return mean(score.wer for score in self.datasets)

    @property
    def rtf(self) -> float:
        """Processing time over audio time, over all datasets."""
        total = sum(score.audio_seconds for score in self.datasets)
        return sum(score.seconds for score in self.datasets) / total

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        keys = ("name", "parameters", "wer", "rtf", "relative_speed", "source")
        datasets = [one.to_json() for one in self.datasets]
        return {key: getattr(self, key) for key in keys} | {"datasets": datasets}


@dataclass(frozen=True)
class Report:
    """The results of all models."""

    models: tuple[ModelResult, ...]
    skipped: dict[str, list[str]]
    """Dataset → skipped clips with the reasons."""
    settings: dict[str, Any]
    """Device, precision, batch size, versions and so on."""
    clips: tuple[ClipResult, ...] = ()

    @property
    def rate(self) -> str:
        """WER, CER or WER/CER: the unit of the error rates."""
        units = {part for e in self.models for s in e.datasets for part in s.rate.split("/")}
        return "/".join(sorted(units, reverse=True)) or "WER"

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        models = [model.to_json() for model in self.models]
        return {"models": models, "skipped": self.skipped, "settings": self.settings}

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of the table: a row per model and dataset, and their mean."""
        with_cer = any(one.cer is not None for model in self.models for one in model.datasets)
        heads = ["model", "params", "data", f"{self.rate} %", "sub", "del", "ins"]
        heads += ["CER %"] * with_cer + ["RTF", "speed"]
        rows = []
        for model in self.models:
            first = [model.name, f"{model.parameters / 1e6:.1f} M"]
            speed, alone = f"{model.relative_speed:.2f}×", len(model.datasets) == 1
            for one in model.datasets:
                words, unit = one.words, f" ({one.rate})" if one.rate != self.rate else ""
                parts = (words.substitutions, words.deletions, words.insertions)
                cells = [one.name + unit, f"{one.wer:.1f}"]
                cells += [f"{100 * part / max(words.reference_words, 1):.1f}" for part in parts]
                cells += ["" if one.cer is None else f"{one.cer:.1f}"] * with_cer
                rows.append([*first, *cells, f"{one.rtf:.3f}", speed if alone else ""])
                first = ["", ""]
            if not alone:
                blank = [""] * (3 + with_cer)
                rows.append([*first, "mean", f"{model.wer:.1f}", *blank, f"{model.rtf:.3f}", speed])
        return heads, rows

    def table(self) -> Table:
        """The table for the terminal; long names of models and datasets are wrapped."""
        heads, rows = self.rows()
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for index, head in enumerate(heads):
            if index in TEXT_COLUMNS:
                table.add_column(head, overflow="fold")
            else:
                table.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """The content of report.md."""
        lines = [markdown_table(*self.rows(), TEXT_COLUMNS), ""]
        units = {"WER": "words", "CER": "characters"}.get(self.rate, "words or characters")
        lines += [
            f"{self.rate}, substitutions, deletions and insertions are percent of the reference "
            f"{units}, after the Whisper normaliser. RTF is processing time over audio time, "
            "without loading and compilation. Speed is relative to "
            f"{self.models[0].name}: the median over batches that all models decoded in turn.",
            "",
            *(f"- {key}: {value}" for key, value in self.settings.items()),
        ]
        for dataset, reasons in self.skipped.items():
            lines.append(f"- {dataset}: {len(reasons)} clips skipped (listed in report.json)")
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Write report.json, report.md and transcripts.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in self.clips]
        for name, contents in (
            ("report.json", text + "\n"),
            ("report.md", self.to_markdown()),
            ("transcripts.jsonl", "".join(lines)),
        ):  # names of datasets may be paths, which may hold any bytes
            (folder / name).write_bytes(contents.encode(errors="backslashreplace"))


def markdown_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()
) -> str:
    """A table in Markdown; all columns but `text_columns` are aligned right."""
    marks = ["---" if index in text_columns else "---:" for index in range(len(heads))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, marks, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def largest_gaps(report: Report, count: int = 10) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the clips on which the models' WER differs most, with the texts."""
    clips: dict[tuple[str, str], list[ClipResult]] = {}
    for one in report.clips:
        clips.setdefault((one.dataset, one.id), []).append(one)

    def gap(same: list[ClipResult]) -> float:
        return max(one.wer for one in same) - min(one.wer for one in same)

    apart = sorted(clips.values(), key=gap, reverse=True)[:count]
    heads = ["clip", "reference", *(model.name for model in report.models)]
    rows = [
        [same[0].id, same[0].reference, *(f"{one.text} ({one.wer:.0f} %)" for one in same)]
        for same in apart
    ]
    return heads, rows


# --- plots; matplotlib (extra `notebook`) is imported when they are drawn -------------------------


def plot_errors(report: Report) -> "Figure":
    """Bars of the error rate in percent, divided into substitutions, deletions and insertions."""
    from matplotlib import pyplot

    bars = {
        f"{model.name}\n{score.name}": score.words
        for model in report.models
        for score in model.datasets
    }
    figure, axes = pyplot.subplots(figsize=(1.5 + 1.8 * len(bars), 4), layout="constrained")
    floor = [0.0] * len(bars)
    for part in ("substitutions", "deletions", "insertions"):
        heights = [
            100 * getattr(words, part) / max(words.reference_words, 1) for words in bars.values()
        ]
        axes.bar(list(bars), heights, bottom=floor, label=part, width=0.6)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set_ylabel(f"{report.rate}, %")
    axes.legend(frameon=False)
    return figure


def plot_speed(report: Report) -> "Figure":
    """Error rate against speed; a model's area grows with its parameters."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for model in report.models:
        axes.scatter(model.relative_speed, model.wer, s=4 * (model.parameters / 1e6) ** 0.75)
        axes.annotate(model.name, (model.relative_speed, model.wer), ha="center", va="bottom")
    axes.set_xlabel(f"speed relative to {report.models[0].name}")
    axes.set_ylabel(f"{report.rate}, %")
    axes.margins(0.2)
    return figure
