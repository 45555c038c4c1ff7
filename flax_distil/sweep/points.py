"""What a sweep runs: the values of its fields, the runs that combine them, and their stages.

    recipe + [sweep.fields] ─► Axis … ─► SweepRun … ─► SweepStage …

A stage goes to a folder named after the values that it depends on and that differ from the
recipe's, OUTPUT_DIR/max_wer=5/filter, or OUTPUT_DIR/base/filter. So stages that runs have in common
are the same folder, and run once.
"""

import copy
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax_distil.config import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    FilterConfig,
    InitStudentConfig,
    PseudoLabelConfig,
    SweepConfig,
)
from flax_distil.errors import InputError
from flax_distil.recipe import Recipe, load_recipe, read_recipe

# The stages of a run in order. "teacher" is the evaluation of the models that no stage makes.
StageConfig = (
    PseudoLabelConfig
    | FilterConfig
    | InitStudentConfig
    | DistillConfig
    | ExportConfig
    | EvaluateConfig
)
CONFIGS: dict[str, type[StageConfig]] = {
    "pseudo-label": PseudoLabelConfig,
    "filter": FilterConfig,
    "init-student": InitStudentConfig,
    "distill": DistillConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
}
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")
RECIPE = "the recipe's"  # label of the recipe's own values, where the sweep gives them no other


@dataclass(frozen=True)
class Axis:
    """What is varied: one field, or several together. values: label → field → value."""

    name: str
    values: Mapping[str, Mapping[str, Any]]
    base: str
    """Label of the recipe's own values."""

    @property
    def numeric(self) -> bool:
        """Whether the labels are numbers; None is allowed beside two of them."""
        labels = [label for label in self.values if label != "None"]
        return len(labels) > 1 and all(map(NUMBER.fullmatch, labels))


@dataclass(frozen=True)
class SweepStage:
    """A stage of one run or several."""

    kind: str
    values: str
    """The values that it depends on, as its folder is named."""
    config: StageConfig
    needs: tuple[Path, ...]
    """Records of the stages whose folders it reads."""
    record: Path
    """Where its outcome is written."""


@dataclass(frozen=True)
class SweepRun:
    """One combination of values. values: label of each axis."""

    name: str
    values: Mapping[str, str]
    stages: Mapping[str, SweepStage]
    """By kind, in order."""

    @property
    def evaluation(self) -> EvaluateConfig:
        """How its student is evaluated."""
        config = self.stages["evaluate"].config
        assert isinstance(config, EvaluateConfig)
        return config


@dataclass(frozen=True)
class SweepPlan:
    """All runs; the others are compared with the first."""

    axes: tuple[Axis, ...]
    runs: tuple[SweepRun, ...]

    @property
    def stages(self) -> dict[Path, SweepStage]:
        """Each stage once, by its record, in an order in which they can run."""
        return {one.record: one for run in self.runs for one in run.stages.values()}


def make_plan(config: SweepConfig) -> SweepPlan:
    """The runs of a sweep.

    Raises:
        InputError: a stage's table is missing or wrong, a field or value does not exist, or a field
            changes nothing that is evaluated.
    """
    recipe = read_recipe(config.recipe)
    if missing := [name for name in ("distill", "export", "evaluate") if name not in recipe[1]]:
        raise InputError(f"{config.recipe} has no table [{missing[0]}], which a sweep needs")
    axes = read_axes(config, recipe)
    base = {axis.name: axis.base for axis in axes}
    if config.design == "grid":
        labels = itertools.product(*(axis.values for axis in axes))
        points = [dict(zip(base, row, strict=True)) for row in labels]
        points.sort(key=lambda point: point != base)
    else:
        points = [base]
        points += [base | {a.name: label} for a in axes for label in a.values if label != a.base]
    runs = [make_run(config, point, axes, recipe) for point in points]
    return SweepPlan(axes, tuple(runs))


def split_field(field: str) -> tuple[str, list[str]]:
    """The stage and the path of a field: init-student.decoder_layers, distill.loss.kl."""
    stage, *path = field.split(".")
    return stage.replace("_", "-"), [name.replace("-", "_") for name in path]


def read_axes(config: SweepConfig, recipe: Recipe) -> tuple[Axis, ...]:
    """The axes of [sweep.fields]. Raises InputError where one is empty or names no field."""
    given: dict[str, Any] = {}

    def collect(name: str, values: Any) -> None:
        """A dotted name that TOML read as tables is joined again."""
        if split_field(name)[0] in CONFIGS and isinstance(values, dict):
            for key, inner in values.items():
                collect(f"{name}.{key}", inner)
        else:
            given[name] = values

    for name, values in config.fields.items():
        collect(name, values)
    if not given:
        raise InputError(f"{config.recipe} has no [sweep.fields]: name fields and their values")
    last = [name.split(".")[-1] for name in given]
    titles = [one if last.count(one) == 1 else name for name, one in zip(given, last, strict=True)]
    pairs = zip(titles, given.items(), strict=True)
    return tuple(make_axis(config, recipe, title, *pair) for title, pair in pairs)


def make_axis(config: SweepConfig, recipe: Recipe, title: str, field: str, given: Any) -> Axis:
    """The axis of one field, or of named sets of fields."""
    where, sets = f"{config.recipe} [sweep.fields] {field}", list[dict[str, Any]]()
    named = isinstance(given, dict) and all(isinstance(one, dict) for one in given.values())
    if named:
        sets = list(given.values())
    elif isinstance(given, list | tuple):
        sets = [{field: one} for one in given]
    if not sets:
        raise InputError(
            f"{where} = {given!r}: give a list of values to a field such as filter.max_wer, or "
            "named sets of fields"
        )
    own, *read = [configured(config, recipe, fields) for fields in ({}, *sets)]
    labels = list(given) if named else [label_of(value_of(one, field)) for one in read]
    values = dict(zip(labels, sets, strict=True))
    same = (label for label, one in zip(labels, read, strict=True) if one == own)
    base = next(same, RECIPE if named else label_of(value_of(own, field)))
    if config.design == "one-at-a-time":
        values.setdefault(base, {})
    if len({folder_part(label) for label in values}) < len(values):
        raise InputError(f"{where} has two values whose folders would have the same name")
    return Axis(title, values, base)


def configured(
    config: SweepConfig, recipe: Recipe, fields: Mapping[str, Any]
) -> dict[str, StageConfig]:
    """The recipe's stages with some fields changed. Raises InputError as `load_recipe` does."""
    text, tables = recipe[0], copy.deepcopy(recipe[1])
    for field, value in fields.items():
        stage, path = split_field(field)
        known = [name for name in CONFIGS if name in tables]
        place = tables[stage] if stage in known else None
        for key in path[:-1]:
            if isinstance(place, list):
                place = place[int(key)] if key.isdigit() and int(key) < len(place) else None
            elif isinstance(place, dict):
                place = place.setdefault(key, {})
        if not (path and isinstance(place, dict)):
            raise InputError(
                f"{config.recipe} [sweep.fields] has {field}, which is no field of a table of the "
                f"recipe: {', '.join(known)}"
            )
        place[path[-1]] = value
    return {
        name: load_recipe(config.recipe, cls, (text, tables))
        for name, cls in CONFIGS.items()
        if name in tables
    }


def value_of(stages: Mapping[str, StageConfig], field: str) -> Any:
    """The value of a field such as distill.loss.kl."""
    stage, path = split_field(field)
    value: Any = stages[stage]
    for key in path:
        value = value[int(key)] if isinstance(value, tuple) else getattr(value, key)
    return value


def label_of(value: Any) -> str:
    """A value as it is shown: 10.0 as 10, and several joined by +."""
    if isinstance(value, tuple):
        return "+".join(map(label_of, value))
    return str(value).removesuffix(".0")


def folder_part(label: str) -> str:
    """A label without characters that folders should not have."""
    return re.sub(r"[^\w.+=-]+", "_", label)


def folder_name(point: Mapping[str, str], axes: Sequence[Axis], names: set[str]) -> str:
    """The folder of what depends on some axes."""
    changed = [one.name for one in axes if one.name in names and point[one.name] != one.base]
    return ",".join(f"{name}={folder_part(point[name])}" for name in changed) or "base"


def make_run(
    config: SweepConfig, point: Mapping[str, str], axes: Sequence[Axis], recipe: Recipe
) -> SweepRun:
    """The stages of one combination of values, each with its own folder.

    A later stage reads what an earlier one wrote by the recipe's own paths: those in an earlier
    stage's `output_dir` are replaced. Labels that no axis changes stay where the recipe has them.
    """
    fields = {name: value for a in axes for name, value in a.values[point[a.name]].items()}
    run = folder_name(point, axes, set(point))
    stages: dict[str, SweepStage] = {}
    places: dict[Path, tuple[Path, str]] = {}  # the recipe's folder → ours, and the stage's kind
    varied: dict[str, set[str]] = {}
    for kind, stage in split_teacher(config, configured(config, recipe, fields)).items():
        used: set[str] = set()
        table = "evaluate" if kind == "teacher" else kind
        own = {a.name for a in axes if any(touches(one, table) for one in a.values.values())}
        stage = replace(relocated(stage, places, used), output_dir=stage.output_dir)
        varied[kind] = own.union(*(varied[one] for one in used))
        values = folder_name(point, axes, varied[kind])
        record = config.output_dir / values / f"{kind}.json"
        folder = stage.output_dir if kind == "pseudo-label" and not own else record.with_suffix("")
        places[stage.output_dir] = folder, kind
        stage = restartable(replace(stage, output_dir=folder), run)
        needs = tuple(stages[one].record for one in stages if one in used)
        stages[kind] = SweepStage(kind, values, stage, needs, record)
    if idle := [axis.name for axis in axes if axis.name not in varied["evaluate"]]:
        raise InputError(
            f"{idle[0]} changes nothing that [evaluate] measures: each stage's paths must name the "
            "output_dir of the stage before it"
        )
    return SweepRun(run, point, stages)


def touches(fields: Mapping[str, Any], table: str) -> bool:
    """Whether one of the fields is in a stage's table."""
    return any(split_field(name)[0] == table for name in fields)


def relocated(value: Any, places: Mapping[Path, tuple[Path, str]], used: set[str]) -> Any:
    """A configuration with the paths in moved folders replaced; `used` gets the stages' kinds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [one.name for one in dataclasses.fields(value)]
        moved = {name: relocated(getattr(value, name), places, used) for name in fields}
        return replace(value, **moved)
    if isinstance(value, tuple):
        return tuple(relocated(one, places, used) for one in value)
    if isinstance(value, str | Path):
        for old in sorted(places, key=lambda one: -len(one.parts)):
            if Path(value).is_relative_to(old):
                new, kind = places[old]
                used.add(kind)
                return type(value)(new / Path(value).relative_to(old))
    return value


def split_teacher(config: SweepConfig, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages, with the evaluation of the models that none of them makes apart from the
    student's. Raises InputError unless there is one student."""
    evaluate = stages.pop("evaluate")
    assert isinstance(evaluate, EvaluateConfig)
    made = [stage.output_dir for stage in stages.values()]
    names = evaluate.names or tuple(Path(source).name for source in evaluate.models)
    if len(names) != len(evaluate.models):
        raise InputError(f"{len(names)} names for {len(evaluate.models)} models")
    pairs = list(zip(evaluate.models, names, strict=True))
    ours = [pair for pair in pairs if any(Path(pair[0]).is_relative_to(one) for one in made)]
    others = [pair for pair in pairs if pair not in ours]
    if len(ours) != 1 or evaluate.assistant:
        raise InputError(
            f"{config.recipe} [evaluate] names {len(ours)} models that a stage of the recipe makes"
            f"{' and an assistant' if evaluate.assistant else ''}: a sweep evaluates one, and no "
            "assistant"
        )
    if others:
        models, names = zip(*others, strict=True)
        stages["teacher"] = replace(evaluate, models=models, names=names, run=None)
    return stages | {"evaluate": replace(evaluate, models=(ours[0][0],), names=())}


def restartable(stage: StageConfig, run: str) -> StageConfig:
    """A stage's configuration such that it continues, or begins again, after a kill."""
    if isinstance(stage, DistillConfig):
        return replace(stage, run=replace(stage.run, resume="auto"))
    if isinstance(stage, FilterConfig):
        return replace(stage, overwrite=True)
    if isinstance(stage, EvaluateConfig) and not stage.names:
        return replace(stage, names=(run,))
    return stage
