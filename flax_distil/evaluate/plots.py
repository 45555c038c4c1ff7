"""Pictures of a report; matplotlib (extra `notebook`) is imported when they are drawn."""

from typing import TYPE_CHECKING

from flax_distil.evaluate.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_errors(report: Report) -> "Figure":
    """Bars of the error rate in percent, parted in substitutions, deletions and insertions."""
    from matplotlib import pyplot

    bars = {
        f"{entry.name}\n{score.dataset}": score.words
        for entry in report.entries
        for score in entry.scores
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
    """Each model's error rate against its speed; area grows with parameters."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for entry in report.entries:
        axes.scatter(entry.relative_speed, entry.wer, s=4 * (entry.parameters / 1e6) ** 0.75)
        axes.annotate(entry.name, (entry.relative_speed, entry.wer), ha="center", va="bottom")
    axes.set_xlabel(f"speed relative to {report.entries[0].name}")
    axes.set_ylabel(f"{report.rate}, %")
    axes.margins(0.2)
    return figure
