"""A training run from configuration to checkpoints: what surrounds the step."""

import json
import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from flax_distil.config import DistillConfig
from flax_distil.data.augment import open_noise, uses_spec_augment
from flax_distil.data.batches import Batch
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import training_sources
from flax_distil.data.utterances import Utterance
from flax_distil.distill.checkpoints import Checkpoints, Progress, has_checkpoints
from flax_distil.distill.encode_once import kept_states
from flax_distil.distill.flops import measured_peak, step_flops, vocabulary_tokens
from flax_distil.distill.heldout import HeldOut, held_out, score
from flax_distil.distill.labels import (
    check_ids,
    check_tasks,
    check_vocabulary,
    taught,
    warn_of_prompts,
    warn_of_teacher,
)
from flax_distil.distill.replicas import check_replicas
from flax_distil.distill.runs import RECIPE, VERSIONS
from flax_distil.distill.setup import (
    check_numbers,
    make_train_spec,
    resolved,
    split_parameters,
    whole_student,
)
from flax_distil.distill.state import TrainState, initial_state
from flax_distil.distill.step import Frozen, TrainSpec, train_step
from flax_distil.distill.stopping import stop_signals
from flax_distil.distill.stored import check_stored_teacher
from flax_distil.distill.tracking import Done, Speed, Tracker, Watch, check_wandb, environment
from flax_distil.distill.validation import Validate, Validation, make_validate
from flax_distil.errors import InputError, check_writable, writing
from flax_distil.files import remove_partial, write_changed
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.spec import unstack_layers
from flax_distil.parallel.chips import published_peak
from flax_distil.parallel.clips import replicate
from flax_distil.parallel.mesh import (
    batch_sharding,
    check_batch,
    make_mesh,
    replicated,
    within,
)
from flax_distil.parallel.multihost import barrier, is_main_host, start
from flax_distil.parallel.overlap import overlap_options
from flax_distil.parallel.sharding import check_heads, place, shardings
from flax_distil.recipe import load_recipe, save_recipe

log = logging.getLogger(__name__)

CHANGEABLE = {"output_dir", "compute", "validation", "run"}  # when a run resumes
CHANGEABLE |= {"max_skipped", "max_skipped_share"}


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended; `finished` is false when it was told to stop and can be continued."""

    output_dir: Path
    steps: int
    finished: bool
    loss: float | None
    skipped: int
    best_wer: float | None
    best_step: int | None


class Batches(Protocol):
    """What the trainer asks of a loader."""

    @property
    def utterances(self) -> Sequence[Utterance]:
        """To name those of a batch."""
        ...

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Batches from a position on, each with the position after it."""
        ...


class Program(NamedTuple):
    """What stays the same from step to step; `step` is `train_step`, compiled, state donated."""

    spec: TrainSpec
    mesh: jax.sharding.Mesh
    frozen: Frozen
    step: Any


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
    check_numbers(config)
    check_folder(config)
    check_wandb(config)
    check_tasks(config)
    teacher = load_checkpoint(config.teacher, config.teacher_revision)
    student = load_checkpoint(config.student, config.student_revision)
    tokens = student.tokens()
    check_vocabulary(config, tokens)
    check_stored_teacher(config, teacher)
    warn_of_teacher(config, teacher)
    validate = make_validate(config, student)
    sources = training_sources(config, tokens)
    check_ids(sources, tokens)
    warn_of_prompts(config, sources)
    config = resolved(config, sources)
    check_numbers(config)
    loader = Loader(
        sources,
        tokens,
        config.batch_size,
        config.run.workers,
        config.run.processes,
        lanes=config.lanes,
        rank=jax.process_index(),
        hosts=jax.process_count(),
        states=kept_states(config, teacher, student, sources),
        add_noise=open_noise(config.augment),
        masks=uses_spec_augment(config.augment),
    )
    facts = taught(config, sources, tokens)
    return train(config, teacher, student, loader, validate, facts, held_out(config, tokens))


def train(
    config: DistillConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    loader: Batches,
    validate: Validate | None = None,
    facts: Mapping[str, Any] | None = None,
    sets: dict[str, HeldOut] | None = None,
) -> TrainSummary:
    """The run itself, over models, batches and a judge that someone else made; see `run`.

    facts: are written beside the versions, such as the languages and tasks of the data.
    sets: are scored by KL and cross-entropy at each validation.
    SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint. So does an error, on a
    single host: no step that was computed is lost.
    """
    check_folder(config)
    program, state = prepare(config, teacher, student)
    checkpoints = Checkpoints(config.output_dir, config.run.keep)
    peak, known = peak_flops(config)
    facts = {"peak_flops": peak, "peak_is": known, **(facts or {})}
    state, progress = begin(config, checkpoints, state, facts)
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
                    watch.dispatched(Done(step, metrics, fed.read, flops(program, fed)))
                    due = step % config.run.save_every == 0
                    if validate and (step % config.validation.every == 0 or step == total):
                        watch.pause()
                        validation = validate(whole(program, state))
                        losses = score(
                            sets or {}, state.params, program.frozen, program.spec, program.mesh
                        )
                        watch.validated(step, validation, losses)
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


def prepare(
    config: DistillConfig, teacher: Checkpoint, student: Checkpoint
) -> tuple[Program, TrainState]:
    """The compiled step and its arguments, placed on the mesh.

    Raises:
        InputError: models, mesh, batch or numbers do not fit; nothing was allocated yet.
    """
    compute = config.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor)
    spec = make_train_spec(config, teacher.dims, student.dims, mesh)
    check_batch(config.batch_size, mesh, compute.accumulation)
    dims = teacher.dims
    check_heads({"encoder": dims.encoder_heads, "decoder": dims.decoder_heads}, mesh)
    trainable, frozen = split_parameters(spec, teacher, student, config.train_encoder)
    begun = partial(initial_state, config=config.optimizer, seed=config.seed)
    placed = shardings(jax.eval_shape(begun, trainable), mesh, compute.fsdp_min_elements)
    frozen = place(frozen, shardings(frozen, mesh, compute.fsdp_min_elements))
    trainable = place(trainable, placed.params)
    state = jax.jit(begun, out_shardings=placed)(trainable)
    options = overlap_options(mesh) if compute.overlap else None
    return Program(spec, mesh, frozen, compile_step(spec, mesh, placed, options)), state


def compile_step(
    spec: TrainSpec,
    mesh: jax.sharding.Mesh,
    placed: Any,
    options: dict[str, str | bool] | None = None,
) -> Any:
    """`train_step` as it runs: jitted with the compiler's `options`, its state donated and kept
    where `placed` says."""

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        with within(mesh):
            return train_step(state, frozen, batch, spec)

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, replicated(mesh)),
        compiler_options=options or None,
    )


def begin(
    config: DistillConfig, checkpoints: Checkpoints, state: TrainState, facts: dict[str, Any]
) -> tuple[TrainState, Progress]:
    """The state and progress to start from, and the run's records written.

    facts: stand in versions.json beside the versions.
    """
    progress = Progress(LoaderState(seed=config.seed))
    if has_checkpoints(config.output_dir):
        begun = check_recipe(config)
        state, progress = checkpoints.restore(state)
        if clips(begun) != clips(config):  # of which the best is not known
            progress = replace(progress, best_wer=None, best_step=None, since_best=0)
        log.info("continuing %s after step %d", config.output_dir, int(state.step))
    checkpoints.forget_best_after(int(state.step))
    barrier(f"{config.output_dir} at step {int(state.step)}")  # all have read what is written now
    if is_main_host():
        with writing(config.output_dir):
            remove_partial(config.output_dir)
            save_recipe(config, config.output_dir / RECIPE)
            versions = json.dumps(environment() | facts, indent=2)
            write_changed(config.output_dir / VERSIONS, versions + "\n")
    return state, progress


def check_folder(config: DistillConfig) -> None:
    """Raises InputError where `run.resume` and the folder contradict each other, or nothing can be
    written there."""
    check_writable(config.output_dir)
    there = has_checkpoints(config.output_dir)
    if there and config.run.resume == "no":
        raise InputError(
            f"{config.output_dir} has checkpoints of a run: continue it with --run.resume must, or "
            "choose another --output-dir"
        )
    if not there and config.run.resume == "must":
        raise InputError(
            f"{config.output_dir} has no checkpoint to resume from: is it the right folder?"
        )


def clips(config: DistillConfig) -> tuple[Any, ...]:
    """What word error rates of different steps must share to be compared."""
    validation = config.validation
    return validation.labels, validation.data, validation.max_clips


def check_recipe(config: DistillConfig) -> DistillConfig:
    """How a resumed run was begun. Raises InputError where it was with other numbers."""
    begun = load_recipe(config.output_dir / RECIPE, DistillConfig)
    changed = [
        f"{field.name} (was {getattr(begun, field.name)}, is {getattr(config, field.name)})"
        for field in fields(config)
        if field.name not in CHANGEABLE
        and getattr(begun, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise InputError(
            f"{config.output_dir} was begun with another recipe: {'; '.join(changed)}. Resume with "
            "the same, or begin a new run"
        )
    return begun


def feed(loader: Batches, start: LoaderState, program: Program) -> Generator[Fed]:
    """Batches on the devices, each sent while the one before is computed."""
    sharding = batch_sharding(program.mesh)
    place_rows = partial(jax.make_array_from_process_local_data, sharding)
    ahead: deque[Fed] = deque()
    with closing(loader.batches(start)) as batches:  # pyright: ignore[reportArgumentType]
        for read, after in batches:
            ahead.append(Fed(jax.tree.map(place_rows, read), after, read))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead


def flops(program: Program, fed: Fed) -> int:
    """Useful operations of one update on this batch."""
    own = program.frozen.student_encoder
    trained = set(own) == {"positions"}
    (rows, length), spec = fed.arrays.tokens.shape, program.spec
    encode, weights_BL = fed.arrays.audio is None, fed.read.weights
    # Of several hosts each knows its own rows, and takes them for any host's.
    hosts = max(rows // len(weights_BL), 1)
    shards = max(spec.data_shards // hosts, 1)
    tokens = vocabulary_tokens(weights_BL, spec.accumulation, shards, spec.vocabulary_chunk)
    return step_flops(spec, rows, length, bool(own), trained, encode, hosts * tokens)


def peak_flops(config: DistillConfig) -> tuple[float, str]:
    """Peak FLOP/s of one device, and whether it is configured, published or measured."""
    compute, kind = config.compute, jax.devices()[0].device_kind
    peak, known = published_peak(kind, compute.dtype), "published"
    if compute.peak_flops is not None:
        peak, known = compute.peak_flops, "configured"
    elif peak is None:
        ours = make_mesh(devices=jax.local_devices())  # hosts need not measure in step
        peak, known = measured_peak(ours, compute.dtype) / ours.size, "measured in products"
    log.info("MFU is of %.3g FLOP/s a device (%s, %s): %s", peak, kind, compute.dtype, known)
    return peak, known


@cache
def replicated_copy(mesh: jax.sharding.Mesh) -> Any:
    """The program that copies a tree of arrays to every device of a mesh."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(program: Program, state: TrainState) -> Any:
    """The whole student with unstacked layers, for decoding: on several hosts, one copy each."""
    params = whole_student(state.params, program.frozen)
    if jax.process_count() > 1:
        copied = replicated_copy(program.mesh)(params)
        params = replicate(jax.tree.map(lambda leaf: leaf.addressable_data(0), copied))
    if not program.spec.student.scan_layers:
        return params
    return params | {"encoder": unstack_layers(params["encoder"])}


def compare(
    checkpoints: Checkpoints, state: TrainState, progress: Progress, validation: Validation
) -> Progress:
    """The progress after a validation; the parameters are saved where they are the best."""
    wer = validation.macro_average
    if progress.best_wer is not None and wer >= progress.best_wer:
        return replace(progress, since_best=progress.since_best + 1)
    progress = replace(progress, best_wer=wer, best_step=int(state.step), since_best=0)
    checkpoints.save_best(state, progress)
    return progress


def patience_over(config: DistillConfig, progress: Progress) -> bool:
    """Whether validations have not improved for long enough to stop."""
    patience = config.validation.patience
    return patience is not None and progress.since_best >= patience


def save(checkpoints: Checkpoints, state: TrainState, progress: Progress, program: Program) -> None:
    """Start to save, unless the copies on different devices disagree (`InputError`)."""
    check_replicas((state.params, state.optimizer), program.mesh, int(state.step))
    checkpoints.save(state, progress)


def rescue(
    checkpoints: Checkpoints, state: TrainState, progress: Progress, program: Program, watch: Watch
) -> None:
    """Save what was computed before an error; a second error here is logged, not raised.

    On several hosts nothing is saved: all would have to, and the others may know of no error. Nor
    where a checkpoint could not be written, which the error says.
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
