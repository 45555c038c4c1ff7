"""From configuration and checkpoints to the compiled step and its arguments, on a mesh.

The trainer takes all of it over arrays, the planner over shapes alone.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from flax_distil.config import DistillConfig
from flax_distil.data.batches import Batch
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import Utterance
from flax_distil.distill.check import check_fit
from flax_distil.distill.step import Frozen, TrainSpec, TrainState, initial_state, train_step
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.generation import context_positions
from flax_distil.model.spec import HALVES, Params, Spec, unstack_layers
from flax_distil.model.student import layer_map, same_arrays
from flax_distil.parallel.chips import free_memory
from flax_distil.parallel.mesh import (
    data_shards,
    make_mesh,
    overlap_options,
    place,
    replicated,
    shardings,
    within,
)
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)

GIB = 2.0**30
# Fields of the configuration that decide the step.
OF_CONFIG = ("loss", "optimizer", "train_encoder", "stored_teacher", "augment", "dropout", "seed")


@runtime_checkable
class Batches(Protocol):
    """What training needs of a loader."""

    @property
    def utterances(self) -> Sequence[Utterance]:
        """By their numbers in `Batch.rows`."""
        ...

    def batches(self, state: LoaderState) -> Iterator[tuple[Batch, LoaderState]]:
        """Batches from a position on, each with the position after it; they do not end."""
        ...


class TrainProgram(NamedTuple):
    """What stays the same from step to step.

    step: `train_step`, compiled for each length of labels, state donated; see `within_memory`.
    """

    spec: TrainSpec
    mesh: Mesh
    frozen: Frozen
    step: Any


def open_loader(
    config: DistillConfig, tokens: WhisperTokens, sources: Sequence[TrainingSource], **options: Any
) -> Loader:
    """This host's loader of batches as they are trained on; options: others of `Loader`."""
    return Loader(
        tuple(sources),
        tokens,
        config.batch_size,
        config.run.workers,
        config.run.processes,
        rank=jax.process_index(),
        hosts=jax.process_count(),
        contexts=context_positions(config.audio_context),
        **options,
    )


def prepare(
    config: DistillConfig, teacher: Checkpoint, student: Checkpoint
) -> tuple[TrainProgram, TrainState]:
    """The compiled step and the state before it, on the mesh.

    Raises:
        InputError: models, mesh and batch do not fit; nothing is allocated yet.
    """
    compute = config.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor)
    same = same_arrays(student.params["encoder"], teacher.params["encoder"])
    spec = make_train_spec(config, teacher.dims, student.dims, mesh, own_encoder=not same)
    if spec.own_encoder:
        log.info("the student's encoder is not the teacher's: both run in each step")
    trainable, frozen = split_parameters(spec, teacher.params, student.params)
    state, frozen_shapes = place_shapes(trainable, frozen, config, mesh)
    frozen = place(frozen, jax.tree.map(lambda leaf: leaf.sharding, frozen_shapes))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    begin = jax.jit(partial(initial_state, config=config.optimizer), out_shardings=placed)
    options = overlap_options(mesh) if compute.overlap else {}
    step = compile_step(spec, mesh, state, options)
    if mesh.devices.flat[0].platform != "tpu":  # whose compiler refuses what does not fit
        step = within_memory(step, spec)
    return TrainProgram(spec, mesh, frozen, step), begin(place(trainable, placed.params))


def make_train_spec(
    config: DistillConfig,
    teacher: WhisperDims,
    student: WhisperDims,
    mesh: Mesh,
    own_encoder: bool = False,
) -> TrainSpec:
    """The static half of the step on this mesh.

    own_encoder: the student's encoder differs from the teacher's.

    Raises:
        InputError: the models do not fit each other, or they or the batch do not fit the mesh.
    """
    check_fit(config, teacher, student, mesh)
    compute, device = config.compute, mesh.devices.flat[0]
    theirs, ours = (HALVES, ("encoder",)) if compute.scan_layers else ((), ())
    return TrainSpec(
        teacher=Spec(teacher, compute.dtype, theirs).on(device),
        student=Spec(student, compute.dtype, ours, compute.remat).on(device),
        layer_map=layer_map(student.decoder_layers, teacher.decoder_layers),
        own_encoder=own_encoder and not config.train_encoder,
        accumulation=compute.accumulation,
        vocabulary_chunk=compute.vocabulary_chunk,
        data_shards=data_shards(mesh),
        **{name: getattr(config, name) for name in OF_CONFIG},
    )


def split_parameters(spec: TrainSpec, teacher: Params, student: Params) -> tuple[Params, Frozen]:
    """Trainable parameters (float32) and all others, from whole models on the host.

    Positions of a trained encoder stay fixed sinusoids. Frozen matrices are stored in the type they
    are multiplied in, which changes no result.
    """
    theirs = {"encoder": teacher["encoder"]}
    if spec.asks_teacher:
        theirs = teacher
    elif spec.stored_teacher:
        embedding = teacher["decoder"]["tokens"]["embedding"]
        theirs = theirs | {"decoder": {"tokens": {"embedding": embedding}}}
    own = {}
    if spec.train_encoder:
        own = {"positions": student["encoder"]["positions"]}
    elif spec.own_encoder:
        own = student["encoder"]
    scanned = bool(spec.student.scan_layers)
    narrow = lambda half: in_frozen_types(stacked(half, scanned), spec.teacher.dtype)
    frozen = Frozen({name: narrow(half) for name, half in theirs.items()}, own and narrow(own))
    return trainable_part(student, spec.train_encoder, scanned), frozen


def trainable_part(student: Params, train_encoder: bool, scanned: bool) -> Params:
    """What is trained of a student: its decoder, and its encoder without the positions."""
    if not train_encoder:
        return {"decoder": student["decoder"]}
    encoder = {n: part for n, part in student["encoder"].items() if n != "positions"}
    return {"decoder": student["decoder"], "encoder": stacked(encoder, scanned)}


def whole_student(trainable: Params, frozen: Frozen) -> Params:
    """All of the student's parameters, where they are: for decoding and saving."""
    own = frozen.student_encoder | trainable.get("encoder", {})
    return {"encoder": own or frozen.teacher["encoder"], "decoder": trainable["decoder"]}


def trained_checkpoint(trainable: Params, student: Checkpoint, scanned: bool) -> Checkpoint:
    """`student` with the trained numbers in place of its own."""
    params = dict(student.params)
    for half, trained in trainable.items():
        trained = unstack_layers(trained) if scanned and half == "encoder" else trained
        params[half] = params[half] | jax.tree.map(np.asarray, trained)
    return replace(student, params=params)


def stacked(half: Params, scanned: bool) -> Params:
    """A half with its layers stacked for a scan, unless they are; on the host."""
    layers = half.get("layers", {})
    if not scanned or 0 not in layers:
        return half
    numbered = [layers[index] for index in range(len(layers))]
    return half | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *numbered)}


def in_frozen_types(tree: Any, dtype: str) -> Any:
    """Kernels, embeddings and positions in the type of the computation, all else as it is."""

    def stored(path: tuple, leaf: Any) -> Any:
        narrowed = path[-1].key in ("kernel", "embedding", "positions")
        return leaf.astype(jnp.dtype(dtype)) if narrowed else leaf

    return jax.tree_util.tree_map_with_path(stored, tree)


def place_shapes(
    trainable: Params, frozen: Frozen, config: DistillConfig, mesh: Mesh
) -> tuple[TrainState, Frozen]:
    """Shapes of the state and the frozen parameters, with their shardings on the mesh."""
    begin = partial(initial_state, config=config.optimizer)
    shapes = jax.eval_shape(lambda: (begin(trainable), frozen))
    placed = shardings(shapes, mesh, config.compute.fsdp_min_elements)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, placed)


def compile_step(
    spec: TrainSpec, mesh: Mesh, state: TrainState, options: dict[str, str | bool]
) -> Any:
    """`train_step` jitted, with the compiler's `options`; the state is donated and stays where
    `state`, arrays or shapes, has it."""

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        with within(mesh):
            return train_step(state, frozen, batch, spec)

    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(placed, replicated(mesh)),
        compiler_options=options or None,
    )


def within_memory(step: Any, spec: TrainSpec) -> Any:
    """`step`, which raises InputError where a program needs more memory than is free.

    That is checked for each length of labels, before its first run. On a CPU a tenth of what is
    free is left for audio, checkpoints and other programs; its devices share one memory.
    """
    lengths: set[int] = set()
    on_cpu = jax.local_devices()[0].platform == "cpu"
    share, devices = (0.9, jax.local_device_count()) if on_cpu else (1.0, 1)

    def checked(state: TrainState, frozen: Frozen, batch: Batch) -> Any:
        clips, length = batch.tokens.shape
        if length not in lengths:
            sizes = step.lower(state, frozen, batch).compile().memory_analysis()
            own = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            jax.block_until_ready(state)  # the update before has given its memory back
            check_memory(own * devices, int(share * free_memory()), clips, length, spec)
            lengths.add(length)
        return step(state, frozen, batch)

    return checked


def check_memory(needed: int, free: int, clips: int, length: int, spec: TrainSpec) -> None:
    """Raises InputError if an update of `clips` labels of `length` tokens needs more bytes than are
    free, else logs both. The message has the accumulation with which it fits."""
    sizes = (
        f"an update of {clips} clips with {length} tokens needs {needed / GIB:.1f} GiB beside the "
        f"models, and {free / GIB:.1f} GiB can be used"
    )
    if needed <= free:
        log.info(sizes)
        return
    rows, least = clips // spec.data_shards, spec.accumulation * math.ceil(needed / max(free, 1))
    micro = next((f"{n}" for n in range(least, rows + 1) if rows % n == 0), None)
    remedy = f"--compute.accumulation {micro} (the same result)" if micro else "--compute.remat"
    raise InputError(f"{sizes}: set {remedy}, or a smaller --batch-size")


def parameter_table(trained: Params, frozen: Frozen) -> Table:
    """All parameters of a run: name, shape, dtype, sharding, trained or frozen.

    Layers whose parameters look the same share a row, whose name has their numbers: `layers.0–31`.
    """
    layers: dict[tuple[str, ...], list[str]] = {}
    counts = {"trained": 0, "frozen": 0}
    for prefix, tree, status in (
        ("student", trained, "trained"),
        ("student.encoder", frozen.student_encoder, "frozen"),
        ("teacher", frozen.teacher, "frozen"),
    ):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
            shape = " × ".join(map(str, leaf.shape)) or "scalar"
            cut = str(getattr(leaf.sharding, "spec", "one device")).removeprefix("PartitionSpec")
            row = re.sub(r"layers\.\d+\.", "layers.*.", name), shape, str(leaf.dtype), cut, status
            layers.setdefault(row, []).extend(re.findall(r"layers\.(\d+)\.", name))
            counts[status] += leaf.size
    table = Table("parameter", "shape", "dtype", "sharding", "")
    table.caption = ", ".join(f"{size / 1e6:,.1f} M {name}" for name, size in counts.items())
    for (name, *cells), numbers in layers.items():
        span = f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else "".join(numbers)
        table.add_row(name.replace("*", span), *cells)
    return table
