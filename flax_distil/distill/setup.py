"""From two checkpoints and a configuration to what the train step takes."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_distil.config import DistillConfig
from flax_distil.data.mixing import TrainingSource
from flax_distil.distill.step import Frozen, TrainSpec
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import HALVES, Params, Spec, unstack_layers
from flax_distil.model.student import layer_map, same_arrays
from flax_distil.parallel.mesh import data_shards
from flax_distil.text.languages import to_language_code

log = logging.getLogger(__name__)

# Numbers that must be 1 or more, by the part of the configuration.
COUNTS = {
    "": ("batch_size", "lanes", "max_skipped"),
    "compute": ("accumulation", "fsdp", "tensor"),
    "run": ("save_every", "keep", "log_every", "workers"),
    "validation": ("every", "batch_size", "max_tokens"),
}


def make_train_spec(
    config: DistillConfig, teacher: WhisperDims, student: WhisperDims, mesh: Mesh
) -> TrainSpec:
    """The static half of the step, as the trainer compiles it on this mesh.

    Raises:
        InputError: teacher and student cannot be compared token by token, or numbers of the
            configuration make no sense.
    """
    check_pair(teacher, student)
    check_numbers(config)
    compute = config.compute
    theirs, ours = (HALVES, ("encoder",)) if compute.scan_layers else ((), ())
    device = mesh.devices.flat[0]
    return TrainSpec(
        teacher=Spec(teacher, compute.dtype, theirs).on(device),
        student=Spec(student, compute.dtype, ours, compute.remat).on(device),
        loss=config.loss,
        optimizer=config.optimizer,
        layer_map=layer_map(student.decoder_layers, teacher.decoder_layers),
        accumulation=compute.accumulation,
        vocabulary_chunk=compute.vocabulary_chunk,
        data_shards=data_shards(mesh),
        stored_teacher=config.stored_teacher,
        augment=config.augment,
        dropout=config.dropout,
    )


def check_pair(teacher: WhisperDims, student: WhisperDims) -> None:
    """Raises InputError where teacher and student differ in more than layers and head counts."""
    for name in ("vocab", "width", "mels", "audio_positions", "text_positions"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise InputError(
                f"the teacher has {name} {theirs} and the student {ours}: make the student of "
                "this teacher with init-student"
            )


def check_numbers(config: DistillConfig) -> None:
    """Raises InputError for settings that could not train anything."""
    loss, optimizer = config.loss, config.optimizer
    if config.language is not None:
        to_language_code(config.language)
    if min(loss.kl, loss.ce, loss.mse) < 0 or loss.kl + loss.ce + loss.mse == 0:
        raise InputError(
            f"loss weights kl {loss.kl}, ce {loss.ce}, mse {loss.mse}: none may be negative and "
            "one must be positive"
        )
    if loss.kl_end is not None and (loss.kl_end < 0 or not loss.kl):
        raise InputError(
            f"loss.kl goes from {loss.kl} to kl_end {loss.kl_end}: the first must be positive and "
            "the second not negative"
        )
    if optimizer.epochs is not None and optimizer.epochs <= 0:
        raise InputError(f"epochs {optimizer.epochs:g} must be positive")
    if loss.temperature <= 0:
        raise InputError(f"temperature {loss.temperature} must be positive: the paper has 2")
    if not 0 <= loss.label_smoothing < 1:
        raise InputError(f"label smoothing {loss.label_smoothing} must be at least 0 and below 1")
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout {config.dropout:g} must be at least 0 and below 1")
    warmup = 0 if optimizer.schedule == "constant" else optimizer.warmup_steps
    if optimizer.steps < 1 or not 0 <= warmup <= optimizer.steps:
        raise InputError(
            f"{optimizer.warmup_steps} warm-up steps do not fit into {optimizer.steps} steps: "
            "choose fewer"
        )
    for name in ("timestamp_probability", "prompt_probability", "max_skipped_share"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise InputError(f"{name} {value:g} must be between 0 and 1")
    for part, names in COUNTS.items():
        of = getattr(config, part, config)
        for name in names:
            if (value := getattr(of, name)) < 1:
                raise InputError(f"{name} {value} must be 1 or more")
    for name in ("learning_rate", "max_gradient_norm"):
        if (value := getattr(optimizer, name)) <= 0:
            raise InputError(f"{name} {value:g} must be positive")
    if not config.label_buckets or not all(1 <= one <= 448 for one in config.label_buckets):
        raise InputError(f"label_buckets {config.label_buckets}: name lengths from 1 to 448 tokens")


def resolved(config: DistillConfig, sources: Sequence[TrainingSource]) -> DistillConfig:
    """The configuration with its epochs as steps, the last batch of them filled up.

    Raises InputError where a stream, whose clips are not counted, is among the sources.
    """
    epochs, sizes = config.optimizer.epochs, [source.size for source in sources]
    if epochs is None:
        return config
    if None in sizes:
        raise InputError(
            f"epochs is {epochs:g} and a stream has no end that is known: give steps instead"
        )
    clips = sum(size or 0 for size in sizes)
    steps = math.ceil(round(epochs * clips, 6) / config.batch_size)
    log.info("%g epochs of %d clips: %d steps", epochs, clips, steps)
    return replace(config, optimizer=replace(config.optimizer, steps=steps))


def split_parameters(
    spec: TrainSpec, teacher: Checkpoint, student: Checkpoint, train_encoder: bool
) -> tuple[Params, Frozen]:
    """Trainable parameters (float32) and all others, as numpy, in the form that `spec` asks for.

    The encoder is shared where it is frozen and the teacher's to the last bit; a truncated or
    otherwise different one is kept apart. Positions of a trained encoder stay fixed sinusoids.
    Frozen matrices are stored in the type they are multiplied in, which changes no result.
    """
    scanned = bool(spec.student.scan_layers)
    encoder = laid_out(student.params["encoder"], scanned)
    read = read_of_teacher(teacher.params, spec)
    theirs = {half: narrow(laid_out(part, scanned), spec) for half, part in read.items()}
    trainable = trainable_part(student.params, train_encoder, scanned)
    if train_encoder:
        return trainable, Frozen(theirs, {"positions": encoder["positions"]})
    if same_arrays(student.params["encoder"], teacher.params["encoder"]):
        return trainable, Frozen(theirs, {})
    log.info("the student's encoder is not the teacher's: both run in each step")
    return trainable, Frozen(theirs, narrow(encoder, spec))


def read_of_teacher(teacher: Params, spec: TrainSpec) -> Params:
    """What the step reads of a teacher: see `Frozen`."""
    if spec.asks_teacher:
        return teacher
    read = {"encoder": teacher["encoder"]}
    if spec.stored_teacher:
        embedding = teacher["decoder"]["tokens"]["embedding"]
        read["decoder"] = {"tokens": {"embedding": embedding}}
    return read


def trainable_part(student: Params, train_encoder: bool, scanned: bool) -> Params:
    """What is trained of a student: its decoder, and its encoder but the positions."""
    if not train_encoder:
        return {"decoder": student["decoder"]}
    encoder = laid_out(student["encoder"], scanned)
    encoder = {name: part for name, part in encoder.items() if name != "positions"}
    return {"decoder": student["decoder"], "encoder": encoder}


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
    return Checkpoint(student.dims, params, student.config, student.generation, student.source)


def laid_out(half: Params, scanned: bool) -> Params:
    """Encoder or decoder parameters as they are, or stacked for a scan; on the host."""
    if not scanned or "layers" not in half:
        return half
    layers = [half["layers"][index] for index in range(len(half["layers"]))]
    return half | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def narrow(tree: Any, spec: TrainSpec) -> Any:
    """Numpy arrays in the types that frozen parameters are kept in."""
    return jax.tree.map(
        lambda leaf, dtype: np.asarray(leaf).astype(dtype), tree, stored_types(tree, spec)
    )


def stored_types(tree: Any, spec: TrainSpec) -> Any:
    """Kernels and embeddings in the type of the computation, all else as it is."""

    def stored(path: tuple, leaf: Any) -> Any:
        narrowed = path[-1].key in ("kernel", "embedding", "positions")
        return jnp.dtype(spec.teacher.dtype) if narrowed else leaf.dtype

    return jax.tree_util.tree_map_with_path(stored, tree)
