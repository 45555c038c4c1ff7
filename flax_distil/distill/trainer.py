"""A training run from configuration to checkpoints: what surrounds the step."""

import logging
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flax_distil.config import DistillConfig
from flax_distil.data.augment import open_noise, uses_spec_augment
from flax_distil.data.batches import Batch
from flax_distil.data.loader import LoaderState
from flax_distil.distill import runs, setup, tracking, validation
from flax_distil.distill.check import check, check_config
from flax_distil.distill.checkpoints import Checkpoints, RunProgress
from flax_distil.distill.encode_once import kept_states
from flax_distil.distill.flops import batch_flops, peak_flops
from flax_distil.distill.setup import Batches, TrainProgram
from flax_distil.distill.step import TrainState
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.spec import unstack_layers
from flax_distil.parallel.clips import replicate
from flax_distil.parallel.mesh import batch_sharding, replicated
from flax_distil.parallel.multihost import is_main_host, start, stop_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended; `finished` is false if it was stopped and can be continued."""

    output_dir: Path
    steps: int
    finished: bool
    loss: float | None
    skipped: int
    best_wer: float | None
    best_step: int | None


def run(config: DistillConfig) -> TrainSummary:
    """Train the student as configured; the run's folder holds everything afterwards.

    Raises:
        InputError: models, labels, mesh or folder do not fit, before anything is computed; or
            training had to stop, after its state was saved.
    """
    start(notices=True)
    check_config(config)
    teacher, student = load_checkpoint(config.teacher), load_checkpoint(config.student)
    config, sources = check(config, teacher, student)
    tokens = student.tokens()
    loader = setup.open_loader(
        config,
        tokens,
        sources,
        lanes=config.lanes,
        states=kept_states(config, teacher, sources),
        add_noise=open_noise(config.augment),
        masks=uses_spec_augment(config.augment),
    )
    validate, sets = validation.make_validate(config, student), validation.held_out(config, tokens)
    facts = runs.training_facts(config, sources, tokens)
    return train(config, teacher, student, loader, validate, facts, sets)


def train(
    config: DistillConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    loader: Batches,
    validate: validation.Validate | None = None,
    facts: Mapping[str, Any] | None = None,
    sets: Mapping[str, validation.HeldOut] | None = None,
) -> TrainSummary:
    """The run itself, over models, batches and a validation from elsewhere; see `run`.

    SIGTERM and Ctrl-C end it after the current step, with a checkpoint. So does an error, on a
    single host: no step that was computed is lost.

    Args:
        config: checked (`check_config`).
        teacher: is read, never written.
        student: where training begins.
        loader: of training batches.
        validate: computes error rates of the student.
        facts: are written beside the versions, such as the languages and tasks of the data.
        sets: are scored by KL and cross-entropy at each validation.
    """
    program, checkpoints, state, progress, speed = begin(config, teacher, student, facts or {})
    total, step, patience = config.optimizer.steps, int(state.step), config.validation.patience

    def finished() -> bool:
        """At the last step, or when validations have not improved for long enough."""
        return step == total or (patience is not None and progress.since_best >= patience)

    with stop_signals() as stop, tracking.Tracker(config, step) as tracker, closing(checkpoints):
        watch = tracking.Watch(config, tracker, speed, loader.utterances)
        with closing(feed(loader, progress.loader, program)) as batches:
            try:
                while not (finished() or stop(step)):
                    arrays, after, read = next(batches)
                    state, metrics = program.step(state, program.frozen, arrays)
                    progress, step = replace(progress, loader=after), step + 1
                    flops = batch_flops(program.spec, read, jax.process_count())
                    watch.dispatched(step, metrics, read, flops)
                    due = step % config.run.save_every == 0
                    if validate and (step % config.validation.every == 0 or step == total):
                        watch.pause()
                        found = validate(whole(program, state))
                        losses = validation.score(sets or {}, state.params, program)
                        watch.validated(step, replace(found, losses=losses))
                        progress = compare(checkpoints, state, progress, found.macro_average)
                        due = True
                    if due:
                        checkpoints.save(state, progress)
                watch.ended(step)
            except Exception:
                rescue(checkpoints, state, progress, watch)
                raise
        checkpoints.save(state, progress)
    log.info("%s at step %d of %d", "finished" if finished() else "stopped", step, total)
    best = progress.best_wer, progress.best_step
    skipped = int(state.skipped)
    return TrainSummary(config.output_dir, step, finished(), watch.loss, skipped, *best)


def begin(
    config: DistillConfig, teacher: Checkpoint, student: Checkpoint, facts: Mapping[str, Any]
) -> tuple[TrainProgram, Checkpoints, TrainState, RunProgress, tracking.Speed]:
    """What a run starts or resumes from; prints the table of parameters."""
    program, state = setup.prepare(config, teacher, student)
    checkpoints = Checkpoints(config.output_dir, config.run.keep)
    peak, source = peak_flops(config)
    known = {"peak_flops": peak, "peak_is": source, **facts}
    state, progress = runs.begin_or_resume(config, checkpoints, state, known)
    if is_main_host():
        Console(stderr=True).print(setup.parameter_table(state.params, program.frozen))
    left = config.optimizer.steps - int(state.step)
    speed = tracking.Speed(peak * program.mesh.size, left)
    return program, checkpoints, state, progress, speed


def feed(
    loader: Batches, start: LoaderState, program: TrainProgram
) -> Generator[tuple[Batch, LoaderState, Batch]]:
    """Batches on the devices, the position after each, and the batch as it was read.

    Each is sent while the one before it is computed.
    """
    place = partial(jax.make_array_from_process_local_data, batch_sharding(program.mesh))
    with closing(loader.batches(start)) as batches:  # pyright: ignore[reportArgumentType]
        placed = ((jax.tree.map(place, read), after, read) for read, after in batches)
        for fed, _ in pairwise(placed):
            yield fed


@cache
def replicated_copy(mesh: jax.sharding.Mesh) -> Any:
    """The program that copies a tree of arrays to every device of a mesh."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(program: TrainProgram, state: TrainState) -> Any:
    """The whole student with unstacked layers, for decoding: on several hosts, one copy each."""
    params = setup.whole_student(state.params, program.frozen)
    if jax.process_count() > 1:
        copied = replicated_copy(program.mesh)(params)
        params = replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), copied))
    if not program.spec.student.scan_layers:
        return params
    return params | {"encoder": unstack_layers(params["encoder"])}


def compare(
    checkpoints: Checkpoints, state: TrainState, progress: RunProgress, wer: float
) -> RunProgress:
    """The progress after a validation; the best parameters so far are saved."""
    if progress.best_wer is not None and wer >= progress.best_wer:
        return replace(progress, since_best=progress.since_best + 1)
    progress = replace(progress, best_wer=wer, best_step=int(state.step), since_best=0)
    checkpoints.save(state, progress, best=True)
    return progress


def rescue(
    checkpoints: Checkpoints, state: TrainState, progress: RunProgress, watch: tracking.Watch
) -> None:
    """Save what was computed before an error; a second error here is logged, not raised.

    Nothing is saved on several hosts, where all would have to and the others may have had no error,
    nor after a checkpoint could not be written.
    """
    if checkpoints.failed:
        return
    if jax.process_count() > 1:
        log.error(
            "stopped by an error on this host; where another one has died, its number follows "
            "within a minute. The last checkpoint stands: run again with --run.resume auto"
        )
        return
    try:
        checkpoints.save(state, progress)
        checkpoints.wait()
        with suppress(InputError):
            watch.pause()
        log.error("stopped by an error; the state of step %d is saved", int(state.step))
    except Exception as error:
        log.error("stopped by an error, and the state could not be saved: %s", error)
