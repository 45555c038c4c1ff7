"""The report of a sweep: a table for each axis in the form of the paper's, and curves."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flax_distil.config import EvaluateConfig, SweepConfig
from flax_distil.evaluate.report import Curve, Report
from flax_distil.evaluate.results import ClipResult, Part, whole_lines
from flax_distil.evaluate.scores import Difference, Interval, Scored, Scores
from flax_distil.evaluate.tables import Cell, ReportTable, Row, rate_names, table
from flax_distil.recipe import read_recipe
from flax_distil.sweep.points import Axis, SweepPlan, SweepRun, SweepStage, folder_part
from flax_distil.sweep.stages import Outcome

NOTE = (
    "Error rates are macro-averages over the datasets, with 95 % confidence intervals; differences "
    "are from the run {}, paired over clips (bootstrap). Labels and hours are those trained on, "
    "kept is their share of all labels. Speed is the teacher's processing time over the run's."
)
FORMATS = {"labels": "{:,}", "hours": "{:,.2f}", "loss": "{:.3f}", "speed": "{:.2f}×"}


@dataclass(frozen=True)
class Evaluated:
    """A model's entry in the report of its evaluation, and its results."""

    model: Mapping[str, Any]
    clips: Mapping[Part, Sequence[ClipResult]]


class SweepScore(NamedTuple):
    """A model on all datasets of one test. datasets: error rates in percent."""

    rate: Interval
    difference: Difference | None
    datasets: Mapping[str, float]
    unit: str


@dataclass(frozen=True)
class Ended:
    """A run with what came of it; student and teacher are None where their evaluation failed."""

    run: SweepRun
    outcomes: Mapping[str, Outcome]
    """By kind of stage."""
    student: Evaluated | None
    teacher: Evaluated | None

    @property
    def teacher_name(self) -> str:
        """The teacher's name, with the values that change how it is evaluated."""
        stage, name = self.run.stages.get("teacher"), self.teacher and self.teacher.model["name"]
        return f"{name}, {stage.values}" if stage and stage.values != "base" else str(name)

    @property
    def error(self) -> str:
        """Why it failed: the stage and its error; "" where it did not."""
        return next((one.error for one in self.outcomes.values() if one.error), "")

    @property
    def speed(self) -> float | None:
        """The teacher's processing time over the student's."""
        rates = [one and one.model["rtf"] for one in (self.teacher, self.student)]
        return rates[0] / rates[1] if rates[0] and rates[1] else None


def sweep_report(plan: SweepPlan, outcomes: Mapping[Path, Outcome], config: SweepConfig) -> Report:
    """The report over all runs; those that failed are rows without figures."""
    runs = [read_run(run, outcomes) for run in plan.runs]
    rows = {one.run.name: row_of(one, runs) for one in runs}
    note, tables, curves = NOTE.format(plan.runs[0].name), list[ReportTable](), list[Curve]()
    for axis in plan.axes:
        series = series_of(axis, runs)
        if len(series) == 1:
            tables.append(sweep_table(axis.name, [axis], series[0], rows, note))
        curves += curve_of(axis, series, rows)
    if len(tables) < len(plan.axes):
        tables.insert(0, sweep_table("All runs", plan.axes, runs, rows, note))
    tables += by_dataset(runs)
    failed = [{"run": one.run.name, "error": one.error} for one in runs if one.error]
    tables += [table("failed", "Failed runs", failed)] if failed else []
    models, settings = dict[str, dict[str, Any]](), dict[str, Any]()
    for one in runs:
        if one.teacher:
            for model in one.outcomes["teacher"].result["models"]:
                models.setdefault(model["name"], model)
    for one in runs:
        if one.student:
            models[one.run.name] = {**one.student.model, "relative_speed": one.speed}
            settings = settings or dict(one.outcomes["evaluate"].result["settings"])
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Report(
        models=list(models.values()),
        tables=tables,
        settings=settings | {"command": command, "runs": len(runs)},
        recipe=read_recipe(config.recipe)[0],
        title=f"Sweep of {', '.join(axis.name for axis in plan.axes)}",
        curves=curves,
    )


def read_run(run: SweepRun, outcomes: Mapping[Path, Outcome]) -> Ended:
    """A run's outcomes, and the results of its evaluations from their folders."""
    own = {kind: outcomes[stage.record] for kind, stage in run.stages.items()}
    models = {
        kind: read_evaluated(run.stages[kind], outcome)
        for kind, outcome in own.items()
        if kind in ("teacher", "evaluate") and not outcome.error
    }
    return Ended(run, own, models.get("evaluate"), models.get("teacher"))


def read_evaluated(stage: SweepStage, outcome: Outcome) -> Evaluated:
    """The first model of an evaluation.

    Where one chunk length was evaluated, it is left out of the setting, so that runs with different
    ones can be compared.
    """
    config, model = stage.config, outcome.result["models"][0]
    assert isinstance(config, EvaluateConfig)
    clips: dict[Part, list[ClipResult]] = {}
    for path in sorted((config.output_dir / "results").rglob("clips.jsonl")):
        for clip in (ClipResult(**line) for line in whole_lines(path)):
            setting = clip.setting
            if len(config.chunk_lengths) == 1:
                setting = setting.split(", ")[0]
            if clip.model == model["name"]:
                clips.setdefault(clip.part._replace(setting=setting), []).append(clip)
    return Evaluated(model, clips)


def score(
    one: Evaluated, first: Evaluated | None, test: str, setting: str, config: EvaluateConfig
) -> SweepScore | None:
    """The scores of a model; None where it was not tested.

    first: what the difference is from. There is none for None, the same model, or one that was
    evaluated on other clips.
    """
    parts = {p: clips for p, clips in one.clips.items() if (p.test, p.setting) == (test, setting)}
    if not parts:
        return None
    models = {"": one}
    if first is not None and first is not one:
        ids = [[clip.id for clip in clips] for clips in parts.values()]
        if ids == [[clip.id for clip in first.clips.get(part, ())] for part in parts]:
            models = {"first": first, "": one}
    scored = [
        Scored(
            part, {name: model.clips[part] for name, model in models.items()}, (), config.error_rate
        )
        for part in parts
    ]
    rate, difference = Scores(config, dict.fromkeys(models, 0), scored).averages(scored)[""]
    datasets = {part.part.dataset: 100 * part.total("").rate for part in scored}
    return SweepScore(rate, difference if len(models) > 1 else None, datasets, rate_names(scored))


def tests_of(runs: Sequence[Ended]) -> dict[str, tuple[str, str]]:
    """The tests with error rates by their names: short clips, and recordings by each method."""
    parts = [part for one in runs if one.student for part in one.student.clips]
    return {
        "" if part.test == "short" else f"long, {part.setting}: ": (part.test, part.setting)
        for part in sorted(parts, key=lambda part: part.test != "short")
        if part.test in ("short", "long")
    }


def row_of(one: Ended, runs: Sequence[Ended]) -> dict[str, Cell]:
    """A run's figures by their headings."""
    short, long = dict[str, Cell](), dict[str, Cell]()
    for name, test in tests_of(runs).items():
        ours = one.student and score(one.student, runs[0].student, *test, one.run.evaluation)
        theirs = one.teacher and score(one.teacher, None, *test, one.run.evaluation)
        unit = next((found.unit for found in (ours, theirs) if found), "WER")
        row = long if name else short
        row[f"{name}{unit} %"] = ours and ours.rate
        row[f"{name}difference"] = ours and ours.difference
        row[f"{name}teacher {unit} %"] = theirs and theirs.rate
    figures = {kind: outcome.result for kind, outcome in one.outcomes.items()}
    labels = figures.get("filter", figures.get("pseudo-label", {}))
    short |= {"labels": labels.get("labels"), "hours": labels.get("hours")}
    short["kept %"] = 100 * labels["labels"] / labels["of"] if labels.get("of") else None
    short["loss"] = figures["distill"].get("loss")
    short["parameters, M"] = one.student and one.student.model["parameters"] / 1e6
    return {**short, "speed": one.speed, **long, "failed": one.error.partition(":")[0] or None}


def by_dataset(runs: Sequence[Ended]) -> list[ReportTable]:
    """Error rates in percent: a table a test with several datasets, a row a run or teacher."""
    made = []
    for name, test in tests_of(runs).items():
        rows: dict[str, Row] = {}
        for one in runs:
            pairs = ((one.run.name, one.student), (one.teacher_name, one.teacher))
            for title, model in pairs:
                found = model and score(model, None, *test, one.run.evaluation)
                if found and len(found.datasets) > 1:
                    rows[title] = {"run": title, **found.datasets}
        title = f"{name}error rate % by dataset"
        if rows:
            made.append(
                table(folder_part(title), title[0].upper() + title[1:], list(rows.values()))
            )
    return made


def series_of(axis: Axis, runs: Sequence[Ended]) -> list[list[Ended]]:
    """Runs that differ in this axis alone, in the order of its values."""
    groups: dict[tuple[str, ...], list[Ended]] = {}
    for one in runs:
        others = tuple(label for name, label in one.run.values.items() if name != axis.name)
        groups.setdefault(others, []).append(one)
    order = list(axis.values)
    if axis.numeric:
        order.sort(key=lambda label: float(label.replace("None", "inf")))
    return [
        sorted(group, key=lambda one: order.index(one.run.values[axis.name]))
        for group in groups.values()
        if len(group) > 1
    ]


def sweep_table(
    title: str,
    axes: Sequence[Axis],
    runs: Sequence[Ended],
    rows: Mapping[str, Row],
    note: str,
) -> ReportTable:
    """A row a run, with its values of the axes."""
    whole = []
    for one in runs:
        labels = [(axis, one.run.values[axis.name]) for axis in axes]
        values = {a.name: float(v) if a.numeric and v != "None" else v for a, v in labels}
        whole.append({**values, **rows[one.run.name]})
    made = table(folder_part(title).lower(), title, whole, note)
    formats = FORMATS | {axis.name: "{:g}" for axis in axes if axis.numeric}
    columns = [replace(one, format=formats.get(one.title, one.format)) for one in made.columns]
    return replace(made, columns=tuple(columns))


def curve_of(axis: Axis, series: Sequence[Sequence[Ended]], rows: Mapping[str, Row]) -> list[Curve]:
    """The curve of a numeric axis: a panel a test, a line a series of runs, and the teacher's."""
    panels: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    for group in series if axis.numeric else ():
        values = group[0].run.values.items() if len(series) > 1 else ()
        own = ", ".join(f"{other} {label}" for other, label in values if other != axis.name)
        for one in group:
            if (value := one.run.values[axis.name]) == "None":
                continue
            for heading, cell in rows[one.run.name].items():
                line = "teacher" if "teacher" in heading else own or "student"
                if isinstance(cell, Interval) and (line != "teacher" or group is series[0]):
                    panel = panels.setdefault(heading.replace("teacher ", ""), {})
                    panel.setdefault(line, []).append((float(value), cell))
    return [Curve(axis.name, panels)] if panels else []
