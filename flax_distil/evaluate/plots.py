"""Figures of a report, with matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from flax_distil.evaluate.report import Curve, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")  # matplotlib's first
HIGHEST = 120  # percent, on the axis of noise: loops may have many hundreds


def figures(report: Report) -> Iterator[tuple[str, "Figure"]]:
    """Title and figure of everything that the report can show."""
    for curve in report.curves:
        yield f"Error rate and {curve.value}", plot_curve(curve)
    measured = [one for one in report.models if one["wer"] is not None]
    timed = [one for one in measured if one["relative_speed"] is not None]
    if len(timed) > 1:
        yield "Error rate and speed", plot_speed(timed)
    if measured:
        yield "Kinds of errors", plot_errors(measured)
    if report.losses:
        yield "Training losses", plot_losses(report.losses)
    for table in report.tables:
        if table.name == "noise":
            yield f"Added noise (axis up to {HIGHEST} %)", plot_noise(table.rows)


def plot_speed(models: Sequence[Mapping[str, Any]]) -> "Figure":
    """Error rate with its interval against speed; a model's area grows with its parameters."""
    figure, axes = new_figure()
    for number, one in enumerate(sorted(models, key=lambda one: one["relative_speed"])):
        speed, wer, colour = one["relative_speed"], one["wer"], f"C{models.index(one)}"
        axes.scatter(speed, wer, s=4 * (one["parameters"] / 1e6) ** 0.75, color=colour, zorder=3)
        if one["interval"]["low"] is not None:
            ends = one["interval"]["low"], one["interval"]["high"]
            axes.vlines(speed, *ends, color=colour, alpha=0.6)
        place = (8, -16 if number % 2 else 8)  # models of one speed do not overlap
        axes.annotate(one["name"], (speed, wer), xytext=place, textcoords="offset points")
    axes.set_xlabel(f"speed relative to {models[0]['name']}")
    axes.set_ylabel("error rate, %")
    axes.margins(0.25)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    return figure


def plot_curve(curve: Curve) -> "Figure":
    """Error rates with their intervals against a value, a panel a test; the teacher is dashed."""
    figure, *panels = new_figure(columns=len(curve.panels))
    for axes, (title, lines) in zip(panels, curve.panels.items(), strict=True):
        for name, points in lines.items():
            values, rates = zip(*points, strict=True)
            dashed = name == "teacher"
            (line,) = axes.plot(
                values,
                [one.value for one in rates],
                marker="" if dashed else "o",
                linestyle="--" if dashed else "-",
                color="gray" if dashed else None,
                markersize=4,
                label=name,
            )
            for value, rate in points:
                if rate.low is not None and rate.high is not None:
                    axes.vlines(value, rate.low, rate.high, color=line.get_color(), alpha=0.5)
        numbers = sorted({value for points in lines.values() for value, _ in points})
        if numbers[0] > 0 and numbers[-1] >= 10 * numbers[0]:
            axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{one:g}" for one in numbers])
        axes.minorticks_off()
        axes.set_xlabel(curve.value)
        axes.set_title(title.removesuffix(" %"), fontsize="medium")
    panels[0].set_ylabel("error rate, %")
    panels[0].legend(frameon=False)
    return figure


def plot_errors(models: Sequence[Mapping[str, Any]]) -> "Figure":
    """Bars of the mean error rate, divided into substitutions, deletions and insertions."""
    names = [one["name"] for one in models]
    figure, axes = new_figure(height=1.6 + 0.55 * len(names))
    left = [0.0] * len(names)
    kinds = {"substitutions": "C3", "deletions": "C4", "insertions": "C5"}  # C0 … are models
    for part, colour in kinds.items():
        widths = [
            sum(data[part] for data in one["datasets"]) / len(one["datasets"]) for one in models
        ]
        axes.barh(names, widths, left=left, label=part, height=0.6, color=colour)
        left = [low + width for low, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("error rate, %")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def plot_noise(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Error rate against the signal-to-noise ratio, a panel a kind of noise (paper figure 3)."""
    kinds = list(dict.fromkeys(row["noise"] for row in rows))
    figure, *panels = new_figure(columns=len(kinds))
    for row in rows:
        axes = panels[kinds.index(row["noise"])]
        rates = {float(name[:-3]): rate for name, rate in row.items() if name.endswith(" dB")}
        axes.plot([*rates], [*rates.values()], marker="o", markersize=4, label=row["model"])
    for kind, axes in zip(kinds, panels, strict=True):
        axes.set_title(kind, fontsize="medium")
        axes.set_xlabel("signal-to-noise ratio, dB")
        axes.invert_xaxis()
    panels[0].set_ylim(0, min(panels[0].get_ylim()[1], HIGHEST))
    panels[0].set_ylabel("error rate, %")
    panels[0].legend(frameon=False)
    return figure


def plot_losses(lines: Sequence[Mapping[str, Any]]) -> "Figure":
    """The training losses, and the validation error rate where there is one."""
    figure, axes = new_figure()
    for name in ("loss", "kl", "ce"):
        points = [(one["step"], one[name]) for one in lines if one.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    rates = [(one["step"], one["validation/wer"]) for one in lines if "validation/wer" in one]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), "o--", color="gray")
        right.set_ylabel("validation error rate, % (dashed)")
    return figure


def new_figure(columns: int = 1, height: float = 3.6) -> "tuple[Figure, *tuple[Axes, ...]]":
    """A figure and its panels, without a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if columns == 1 else 5.6 * columns, height), layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return (figure, *panels)


def to_svg(figure: "Figure") -> str:
    """The figure as SVG that takes the page's colours and font."""
    from matplotlib import rc_context

    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "flax-distil"}):
        figure.savefig(
            text,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{number})")
    return svg
