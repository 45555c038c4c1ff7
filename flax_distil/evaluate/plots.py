"""Plots of a report; matplotlib (extra `notebook`) is imported when they are drawn."""

from typing import TYPE_CHECKING

from flax_distil.evaluate.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_errors(report: Report) -> "Figure":
    """Bars of the error rate in percent, divided into substitutions, deletions and insertions."""
    from matplotlib import pyplot

    bars = {
        f"{model.name}\n{score.dataset}": score.words
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
