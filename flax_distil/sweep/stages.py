"""The stages of a sweep run, each once, in this process or as tasks of a Ray cluster.

A stage that ends leaves a record beside its folder, OUTPUT_DIR/max_wer=5/filter.json: its settings,
seconds and figures, or its error. Stages with a record are not run again, failed ones are.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import jax

from flax_distil import export
from flax_distil.config import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    FilterConfig,
    InitStudentConfig,
    PseudoLabelConfig,
)
from flax_distil.distill import trainer
from flax_distil.distill.runs import flat
from flax_distil.errors import InputError, Stopped
from flax_distil.evaluate import evaluator
from flax_distil.files import write_whole
from flax_distil.model import student
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import labeller
from flax_distil.pseudo_label.ray_engine import RETRIES, connect
from flax_distil.sweep.points import StageConfig, SweepPlan, SweepStage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. result: figures that the report shows. error: "" where it is done."""

    settings: Mapping[str, Any]
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def execute(config: StageConfig) -> dict[str, Any]:
    """Run a stage, and return the figures that the report shows.

    Raises Stopped where training was asked to stop, and what the stage raises.
    """
    match config:
        case PseudoLabelConfig():
            labelled = labeller.run(config)
            return {"labels": labelled.labels, "hours": labelled.seconds / 3600}
        case FilterConfig():
            report = filtering.run(config)
            return {"labels": report.kept, "of": report.labels, "hours": report.kept_hours}
        case InitStudentConfig():
            student.run(config)
            return {}
        case DistillConfig():
            trained = trainer.run(config)
            if not trained.finished:
                raise Stopped(
                    f"training was stopped at update {trained.steps} and is saved in "
                    f"{config.output_dir}: start the sweep again to continue"
                )
            return {"updates": trained.steps, "loss": trained.loss}
        case ExportConfig():
            export.run(config)
            return {}
        case EvaluateConfig():
            evaluation = evaluator.run(config)
            return {"models": evaluation.models, "settings": evaluation.settings}


def run_stage(stage: SweepStage, *needed: Outcome) -> Outcome:
    """Run a stage, unless it is done or one that it needs has failed.

    Raises Stopped where training was asked to stop. Other errors are recorded.
    """
    settings = settings_of(stage.config)
    if failed := next((one.error for one in needed if one.error), None):
        return Outcome(settings, error=failed)
    recorded = read_record(stage)
    if recorded is not None and not recorded.error:
        return recorded
    log.info("%s: %s", stage.values, stage.kind)
    begun, figures, error = time.monotonic(), {}, ""
    try:
        figures = execute(stage.config)
    except Stopped:
        raise
    except Exception as raised:
        known = isinstance(raised, InputError)
        log.error("%s: %s: %s", stage.values, stage.kind, raised, exc_info=not known)
        error = f"{stage.kind}: {raised or type(raised).__name__}"
    jax.clear_caches()  # the programs of other stages are others
    outcome = Outcome(settings, time.monotonic() - begun, figures, error)
    stage.record.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(outcome), indent=1)
    write_whole(stage.record, text.encode(errors="backslashreplace"))
    return outcome


def read_record(stage: SweepStage) -> Outcome | None:
    """The outcome of an earlier run of the stage, if it and the stage's folder are there."""
    if not (stage.record.is_file() and stage.config.output_dir.exists()):
        return None
    return Outcome(**json.loads(stage.record.read_text()))


def settings_of(config: StageConfig) -> dict[str, Any]:
    """The fields of a stage that decide its result, as JSON holds them."""
    ignored = ("output_dir", "run.")  # of distill: how it is saved and logged
    fields = {name: v for name, v in flat(config).items() if not name.startswith(ignored)}
    return json.loads(json.dumps(fields, default=str))


def finished_stages(plan: SweepPlan) -> dict[Path, Outcome]:
    """Outcomes of the stages that are done, by their records.

    Raises InputError where one was run with other settings than the recipe has now.
    """
    done = {}
    for record, stage in plan.stages.items():
        outcome = read_record(stage)
        if outcome is None or outcome.error:
            continue
        now = settings_of(stage.config)
        changed = [
            f"{name} (was {outcome.settings.get(name)}, is {now.get(name)})"
            for name in {**outcome.settings, **now}
            if outcome.settings.get(name) != now.get(name)
        ]
        if changed:
            raise InputError(
                f"{stage.config.output_dir} was made with another recipe: {'; '.join(changed)}. "
                f"Continue with the same, choose another --output-dir, or delete {record} to run "
                "it again"
            )
        done[record] = outcome
    return done


def run_here(stages: Sequence[SweepStage]) -> Iterator[tuple[SweepStage, Outcome]]:
    """Each stage with its outcome, one after the other in this process."""
    outcomes: dict[Path, Outcome] = {}
    for stage in stages:
        outcomes[stage.record] = run_stage(stage, *(outcomes[one] for one in stage.needs))
        yield stage, outcomes[stage.record]


def run_on_ray(
    stages: Sequence[SweepStage], accelerators: int | None = None
) -> Iterator[tuple[SweepStage, Outcome]]:
    """Each stage with its outcome as tasks end; a task waits for those whose folders it reads.

    A task whose process dies is started again, which continues the stage. Raises InputError where
    Ray is not installed or the cluster cannot be reached.
    """
    ray = connect()
    from ray.exceptions import RayError

    options = task_options(ray.nodes(), accelerators)
    task = ray.remote(max_retries=RETRIES, retry_exceptions=[Stopped], **options)(run_in)
    tasks: dict[Path, Any] = {}
    for stage in stages:
        needed = (tasks[one] for one in stage.needs)
        tasks[stage.record] = task.remote(Path.cwd(), stage, *needed)
    waiting = {tasks[stage.record]: stage for stage in stages}
    while waiting:
        (ended,), _ = ray.wait(list(waiting))
        stage = waiting.pop(ended)
        try:
            yield stage, ray.get(ended)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            yield stage, Outcome(settings_of(stage.config), error=f"{stage.kind}: {reason}")


def run_in(folder: Path, stage: SweepStage, *needed: Outcome) -> Outcome:
    """Run a stage in a folder, from which relative paths start."""
    os.chdir(folder)
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("flax_distil").setLevel(logging.INFO)
    return run_stage(stage, *needed)


def task_options(
    nodes: Sequence[Mapping[str, Any]], accelerators: int | None = None
) -> dict[str, Any]:
    """What a task needs of a cluster: `accelerators` TPU chips or GPUs, or processor cores where
    there are neither; by default all of a machine."""
    most = {
        kind: int(max(node["Resources"].get(kind, 0) for node in nodes))
        for kind in ("TPU", "GPU", "CPU")
    }
    kind = next(kind for kind, count in most.items() if count or kind == "CPU")
    count = accelerators or most[kind]
    return {"resources": {"TPU": count}} if kind == "TPU" else {f"num_{kind.lower()}s": count}


def remaining_seconds(left: Sequence[SweepStage], done: Mapping[str, Sequence[float]]) -> float:
    """Expected seconds of the stages that are left, one after the other.

    done: seconds of finished stages by kind; a kind of which none is finished takes their mean.
    """
    every = [seconds for some in done.values() for seconds in some]
    return sum(mean(done.get(stage.kind) or every or [0.0]) for stage in left)
