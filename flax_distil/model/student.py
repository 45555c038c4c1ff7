"""A student out of a teacher's layers: copying is indexing (paper section 3, figure 1)."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_distil.config import InitStudentConfig
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.generation import upper_half

log = logging.getLogger(__name__)


def run(config: InitStudentConfig) -> Path:
    """Write the student of `config.teacher` to `config.output_dir` and return that folder."""
    teacher = load_checkpoint(config.teacher)
    student = init_student(teacher, config.decoder_layers, config.encoder_layers)
    save_checkpoint(student, config.output_dir)
    log.info(
        "student: %d of %d encoder and %d of %d decoder layers of %s → %s",
        *(student.dims.encoder_layers, teacher.dims.encoder_layers),
        *(student.dims.decoder_layers, teacher.dims.decoder_layers),
        *(config.teacher, config.output_dir),
    )
    return Path(config.output_dir)


def init_student(
    teacher: Checkpoint,
    decoder_layers: int | Sequence[int] = 2,
    encoder_layers: int | Sequence[int] | None = None,
) -> Checkpoint:
    """The teacher with fewer layers; everything else is the teacher's own, arrays shared.

    Layers are a number of maximally spaced ones or the indices to take, in the student's order.
    The encoder is kept whole where `encoder_layers` is None, as in the paper.

    Raises:
        InputError: layers that the teacher does not have, negative, repeated or none.
    """
    kept, dims = kept_layers(teacher.dims, decoder_layers, encoder_layers)
    params = {}
    for half, theirs in teacher.params.items():
        layers = {new: theirs["layers"][old] for new, old in enumerate(kept[half])}
        params[half] = theirs | {"layers": layers}
    # Heads of layers that are not copied would be of layers that the student lacks: word timestamps
    # would crash. Where none is left, those of a model without known heads serve.
    heads = teacher.generation.get("alignment_heads")
    new = {old: index for index, old in enumerate(kept["decoder"])}
    survivors = sorted([new[layer], head] for layer, head in heads or () if layer in new)
    heads = [] if heads == [] else survivors or upper_half(dims)
    return replace(
        teacher,
        dims=dims,
        params=params,
        config=teacher.config | dims_to_hf(dims),
        generation=teacher.generation | {"alignment_heads": heads},
    )


def kept_layers(
    teacher: WhisperDims,
    decoder_layers: int | Sequence[int],
    encoder_layers: int | Sequence[int] | None,
) -> tuple[dict[str, tuple[int, ...]], WhisperDims]:
    """The teacher's layers in the halves of a student, and the student's sizes."""
    whole = teacher.encoder_layers if encoder_layers is None else encoder_layers
    kept = {
        "decoder": choose_layers(decoder_layers, teacher.decoder_layers, "decoder"),
        "encoder": choose_layers(whole, teacher.encoder_layers, "encoder"),
    }
    counts = {f"{half}_layers": len(layers) for half, layers in kept.items()}
    return kept, replace(teacher, **counts)


def choose_layers(wanted: int | Sequence[int], available: int, half: str) -> tuple[int, ...]:
    """Indices into `available` layers: maximally spaced for a number, checked for a list."""
    if isinstance(wanted, int):
        if not 1 <= wanted <= available:
            raise InputError(
                f"{wanted} {half} layers cannot be taken from a teacher with {available}: "
                f"choose 1 to {available}"
            )
        # As the published script has them (create_student_model.py), float rounding included: the
        # last one is forced, so that a single one is the last.
        places = np.linspace(0, available - 1, wanted, dtype=int).tolist()
        return (*places[:-1], available - 1)
    layers = tuple(wanted)
    wrong = [layer for layer in layers if not 0 <= layer < available]
    if wrong or not layers or len(set(layers)) < len(layers):
        fault = f"has {wrong}" if wrong else "repeats a layer" if layers else "is empty"
        raise InputError(
            f"the list of {half} layers {list(layers)} {fault}: "
            f"name each of 0 to {available - 1} at most once"
        )
    return layers


def layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer, from 0, whose output each student layer has to reach (paper's D.2).

    Student layer l stands for an even share of the teacher's: 2 of 32 stand for 1 … 16 and
    17 … 32, so the pairs (counted from 1) are 1 → 16 and 2 → 32.
    """
    return tuple(
        (layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)
    )


def same_arrays(first: Any, second: Any) -> bool:
    """Whether two parameter trees have the same names, shapes and numbers."""
    leaves, structure = jax.tree.flatten(first)
    others, other_structure = jax.tree.flatten(second)
    return structure == other_structure and all(
        a is b or np.array_equal(a, b) for a, b in zip(leaves, others, strict=True)
    )
