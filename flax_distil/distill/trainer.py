"""A training run from configuration to checkpoints: what surrounds the step."""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from flax_distil.config import DistillConfig
from flax_distil.data.augment import open_noise, uses_spec_augment
from flax_distil.data.batches import Batch
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.utterances import Utterance
from flax_distil.distill.check import check, check_config
from flax_distil.distill.checkpoints import Checkpoints, RunProgress
from flax_distil.distill.encode_once import kept_states
from flax_distil.distill.flops import batch_flops, peak_flops
from flax_distil.distill.heldout import HeldOut, held_out, score
from flax_distil.distill.parameters import show_parameters
from flax_distil.distill.replicas import check_replicas
from flax_distil.distill.runs import begin_or_resume, training_facts
from flax_distil.distill.setup import TrainProgram, prepare, whole_student
from flax_distil.distill.state import TrainState
from flax_distil.distill.tracking import Done, Speed, Tracker, Watch
from flax_distil.distill.validation import Validate, Validation, make_validate
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.spec import unstack_layers
from flax_distil.parallel.clips import replicate
from flax_distil.parallel.mesh import batch_sharding, replicated
from flax_distil.parallel.multihost import start, stop_signals

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


@runtime_checkable
class Batches(Protocol):
    """What the trainer needs of a loader."""

    @property
    def utterances(self) -> Sequence[Utterance]:
        """By their numbers in `Batch.rows`."""
        ...

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Batches from a position on, each with the position after it."""
        ...


class Fed(NamedTuple):
    """A batch on the devices, the loader's position after it, and the batch as it was read."""

    arrays: Batch
    after: LoaderState
    read: Batch


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
    loader = Loader(
        sources,
        tokens,
        config.batch_size,
        config.run.workers,
        config.run.processes,
        lanes=config.lanes,
        rank=jax.process_index(),
        hosts=jax.process_count(),
        states=kept_states(config, teacher, sources),
        add_noise=open_noise(config.augment),
        masks=uses_spec_augment(config.augment),
    )
    validate, sets = make_validate(config, student), held_out(config, tokens)
    facts = training_facts(config, sources, tokens)
    return train(config, teacher, student, loader, validate, facts, sets)


def train(
    config: DistillConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    loader: Batches,
    validate: Validate | None = None,
    facts: Mapping[str, Any] | None = None,
    sets: Mapping[str, HeldOut] | None = None,
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
    program, state = prepare(config, teacher, student)
    checkpoints = Checkpoints(config.output_dir, config.run.keep)
    peak, source = peak_flops(config)
    facts = {"peak_flops": peak, "peak_is": source, **(facts or {})}
    state, progress = begin_or_resume(config, checkpoints, state, facts)
    show_parameters(state.params, program.frozen)
    total, step = config.optimizer.steps, int(state.step)
    speed = Speed(peak * program.mesh.size, total - step)
    with stop_signals() as stop, Tracker(config, step) as tracker, closing(checkpoints):
        watch = Watch(config, tracker, speed, loader.utterances)
        with closing(feed(loader, progress.loader, program)) as batches:
            try:
                while step < total and not (stop(step) or patience_over(config, progress)):
                    fed = next(batches)
                    state, metrics = program.step(state, program.frozen, fed.arrays)
                    progress, step = replace(progress, loader=fed.after), step + 1
                    flops = batch_flops(program.spec, fed.read, jax.process_count())
                    watch.dispatched(Done(step, metrics, fed.read, flops))
                    due = step % config.run.save_every == 0
                    if validate and (step % config.validation.every == 0 or step == total):
                        watch.pause()
                        validation = validate(whole(program, state))
                        watch.validated(step, validation, score(sets or {}, state.params, program))
                        progress, due = compare(checkpoints, state, progress, validation), True
                    if due:
                        save(checkpoints, state, progress, program)
                watch.pause()
                watch.ended(step)
            except Exception:
                rescue(checkpoints, state, progress, program, watch)
                raise
        save(checkpoints, state, progress, program)
    finished = step == total or patience_over(config, progress)
    log.info("%s at step %d of %d", "finished" if finished else "stopped", step, total)
    return TrainSummary(
        output_dir=config.output_dir,
        steps=step,
        finished=finished,
        loss=watch.loss,
        skipped=int(state.skipped),
        best_wer=progress.best_wer,
        best_step=progress.best_step,
    )


def feed(loader: Batches, start: LoaderState, program: TrainProgram) -> Generator[Fed]:
    """Batches on the devices, each sent while the one before it is computed."""
    sharding = batch_sharding(program.mesh)
    place_rows = partial(jax.make_array_from_process_local_data, sharding)
    ahead: deque[Fed] = deque()
    with closing(loader.batches(start)) as batches:  # pyright: ignore[reportArgumentType]
        for read, after in batches:
            ahead.append(Fed(jax.tree.map(place_rows, read), after, read))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


@cache
def replicated_copy(mesh: jax.sharding.Mesh) -> Any:
    """The program that copies a tree of arrays to every device of a mesh."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(program: TrainProgram, state: TrainState) -> Any:
    """The whole student with unstacked layers, for decoding: on several hosts, one copy each."""
    params = whole_student(state.params, program.frozen)
    if jax.process_count() > 1:
        copied = replicated_copy(program.mesh)(params)
        params = replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), copied))
    if not program.spec.student.scan_layers:
        return params
    return params | {"encoder": unstack_layers(params["encoder"])}


def compare(
    checkpoints: Checkpoints, state: TrainState, progress: RunProgress, validation: Validation
) -> RunProgress:
    """The progress after a validation; the best parameters so far are saved."""
    wer = validation.macro_average
    if progress.best_wer is not None and wer >= progress.best_wer:
        return replace(progress, since_best=progress.since_best + 1)
    progress = replace(progress, best_wer=wer, best_step=int(state.step), since_best=0)
    checkpoints.save_best(state, progress)
    return progress


def patience_over(config: DistillConfig, progress: RunProgress) -> bool:
    """Whether validations have not improved for long enough to stop."""
    patience = config.validation.patience
    return patience is not None and progress.since_best >= patience


def save(
    checkpoints: Checkpoints, state: TrainState, progress: RunProgress, program: TrainProgram
) -> None:
    """Start to save, unless the copies on different devices disagree (`InputError`)."""
    check_replicas((state.params, state.optimizer), program.mesh, int(state.step))
    checkpoints.save(state, progress)


def rescue(
    checkpoints: Checkpoints,
    state: TrainState,
    progress: RunProgress,
    program: TrainProgram,
    watch: Watch,
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
        save(checkpoints, state, progress, program)
        checkpoints.wait()
        with suppress(InputError):
            watch.pause()
        log.error("stopped by an error; the state of step %d is saved", int(state.step))
    except Exception as error:
        log.error("stopped by an error, and the state could not be saved: %s", error)
