"""Students for each value of some recipe fields, trained and compared: the paper's ablations."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flax_distil.config import SweepConfig
from flax_distil.errors import SomeFailed, check_writable, writing
from flax_distil.evaluate import Report
from flax_distil.recipe import save_recipe
from flax_distil.sweep.points import SweepPlan, make_plan
from flax_distil.sweep.report import sweep_report
from flax_distil.sweep.stages import (
    Outcome,
    finished_stages,
    remaining_seconds,
    run_here,
    run_on_ray,
)

log = logging.getLogger(__name__)


def run(config: SweepConfig) -> Report | None:
    """Run every stage of every run that is not done yet, and write sweep.html, .md and .json.

    A killed sweep continues where it was. Each run's recipe is in its folder, so that its stages
    can also be run by hand. Returns None for a dry run.

    Raises:
        InputError: the recipe cannot be used, or a finished stage had other settings.
        SomeFailed: some runs failed; the others are done and reported.
        Stopped: training was asked to stop.
    """
    check_writable(config.output_dir)
    plan = make_plan(config)
    done = finished_stages(plan)
    Console().print(plan_table(plan, done))
    if config.dry_run:
        return None
    with writing(config.output_dir):
        for one in plan.runs:
            for kind, stage in one.stages.items():
                if kind != "teacher":  # whose table would be the student's
                    save_recipe(stage.config, config.output_dir / one.name / "recipe.toml")
    outcomes = run_stages(plan, config)
    report = sweep_report(plan, outcomes, config)
    report.print(Console())
    with writing(config.output_dir):
        report.save(config.output_dir, "sweep")
    log.info("wrote sweep.html, sweep.md and sweep.json to %s", config.output_dir)
    failed = [
        one.name
        for one in plan.runs
        if any(outcomes[stage.record].error for stage in one.stages.values())
    ]
    if failed:
        raise SomeFailed(
            f"{len(failed)} of {len(plan.runs)} runs failed ({', '.join(failed)}): see "
            f"{config.output_dir}/sweep.md. The same command tries them again"
        )
    return report


def run_stages(plan: SweepPlan, config: SweepConfig) -> dict[Path, Outcome]:
    """The outcomes of all stages by their records; logs how many are left, and for how long."""
    stages, outcomes = list(plan.stages.values()), {}
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    ended = (
        run_on_ray(stages, config.ray_accelerators) if config.engine == "ray" else run_here(stages)
    )
    for stage, outcome in ended:
        outcomes[stage.record] = outcome
        if not outcome.error:
            seconds[stage.kind].append(outcome.seconds)
        waiting = [one for one in stages if one.record not in outcomes]
        left = timedelta(seconds=round(remaining_seconds(waiting, seconds)))
        log.info("%d of %d stages ended, about %s left", len(outcomes), len(stages), left)
    return outcomes


def plan_table(plan: SweepPlan, done: Mapping[Path, Outcome]) -> Table:
    """A row a folder: its stages, and the runs that use one of them."""
    title = f"{len(plan.runs)} runs of {len(plan.stages)} stages, {len(done)} of them done (✓)"
    table = Table("folder", "stages", "runs", title=title)
    folders: dict[str, dict[str, str]] = {}
    for record, stage in plan.stages.items():
        mark = " ✓" if record in done else ""
        folders.setdefault(stage.values, {})[stage.kind] = stage.kind + mark
    for folder, kinds in folders.items():
        users = [
            run.name
            for run in plan.runs
            if any(stage.values == folder for stage in run.stages.values())
        ]
        named = ", ".join(users) if len(users) < 4 else f"{len(users)} runs"
        table.add_row(folder, ", ".join(kinds.values()), named)
    return table
