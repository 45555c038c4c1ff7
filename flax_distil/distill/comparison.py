"""`flax-distil runs`: training runs side by side, from their files."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flax_distil.config import DistillConfig, RunsConfig
from flax_distil.distill.checkpoints import LATEST, steps
from flax_distil.distill.runs import RECIPE, flat
from flax_distil.distill.tracking import METRICS
from flax_distil.errors import InputError
from flax_distil.recipe import load_recipe

PLACES = {"output_dir", "run"}  # fields of where a run is kept, not of what it trains


@dataclass(frozen=True)
class RunFacts:
    """The figures of one run; None if it did not get so far."""

    name: str
    step: int
    """Updates that were made."""
    steps: int
    """Updates that were asked for."""
    saved: int | None
    """Update of the latest checkpoint."""
    loss: float | None
    """Mean over the last tenth of the updates."""
    wer: float | None
    """The best macro-average, in percent."""
    wer_step: int | None
    samples_per_second: float | None
    """Median."""
    mfu: float | None
    skipped: int
    """Updates that were not finite."""
    recipe: dict[str, Any]
    """Fields by their full names."""


def run(config: RunsConfig) -> list[RunFacts]:
    """Print all runs below a folder, the best first, and the fields in which their recipes differ.

    Raises InputError if there is no run, or for a recipe that cannot be read.
    """
    paths = sorted(path.parent for path in config.folder.rglob(RECIPE) if is_training(path))
    if not paths:
        raise InputError(f"{config.folder} has no training run: name the folder that holds some")
    runs = sorted((read_run(path, config.folder) for path in paths), key=rank)
    differing = differences(runs)
    if config.json:
        rows = [asdict(one) for one in runs]
        print(json.dumps({"runs": rows, "differing": differing}, indent=2, default=str))
    else:
        console = Console()
        console.print(table(runs))
        if differing:
            console.print(recipe_table(runs, differing))
    return runs


def is_training(path: Path) -> bool:
    """Whether a recipe is in a run's folder; users may have recipes anywhere."""
    return (path.parent / METRICS).is_file() or (path.parent / LATEST).is_dir()


def rank(one: RunFacts) -> tuple[float, float]:
    """By WER, then by loss; unknown values come last."""
    known = (one.wer, one.loss)
    wer, loss = (float("inf") if value is None else value for value in known)
    return wer, loss


def read_run(path: Path, root: Path) -> RunFacts:
    """The facts of the run in `path`."""
    config = load_recipe(path / RECIPE, DistillConfig)
    lines = read_metrics(path / METRICS)
    trained = [line for line in lines if line.get("loss") is not None]
    tail = trained[-max(len(trained) // 10, 1) :]
    validated = [line for line in lines if line.get("validation/wer") is not None]
    best = min(validated, key=lambda line: line["validation/wer"], default={})
    name = path.relative_to(root).as_posix()
    return RunFacts(
        name=path.name if name == "." else name,
        step=max((line["step"] for line in lines), default=0),
        steps=config.optimizer.steps,
        saved=max(steps(path / LATEST), default=None),
        loss=statistics.mean(line["loss"] for line in tail) if tail else None,
        wer=best.get("validation/wer"),
        wer_step=best.get("step"),
        samples_per_second=median(lines, "samples_per_second"),
        mfu=median(lines, "mfu"),
        skipped=int(max((line.get("skipped") or 0 for line in lines), default=0)),
        recipe={n: v for n, v in flat(config).items() if n.split(".")[0] not in PLACES},
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but a last one that is being written."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def median(lines: list[dict[str, Any]], name: str) -> float | None:
    """Of the lines that have the value."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None


def differences(runs: list[RunFacts]) -> list[str]:
    """The fields of which the recipes have different values."""
    first = runs[0].recipe
    return [name for name in first if any(one.recipe[name] != first[name] for one in runs)]


def table(runs: list[RunFacts]) -> Table:
    """A row a run."""
    columns = ("run", "step", "saved", "loss", "best WER %", "at step", "samples/s", "MFU %")
    made = Table(*columns, "skipped")
    for one in runs:
        mfu = None if one.mfu is None else 100 * one.mfu
        made.add_row(
            one.name,
            f"{one.step}/{one.steps}",
            shown(one.saved),
            shown(one.loss, ".4f"),
            shown(one.wer, ".2f"),
            shown(one.wer_step),
            shown(one.samples_per_second, ".2f"),
            shown(mfu, ".1f"),
            str(one.skipped),
        )
    return made


def recipe_table(runs: list[RunFacts], names: list[str]) -> Table:
    """A row a field that differs, a column a run."""
    made = Table("recipes differ in", *(one.name for one in runs))
    for name in names:
        made.add_row(name, *(str(one.recipe[name]) for one in runs))
    return made


def shown(value: float | None, form: str = "") -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)
