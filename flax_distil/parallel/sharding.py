"""Which device holds which part of which parameter: a rule over names and shapes.

Optimizer state repeats the parameters' names, so one rule serves parameters, gradients, moments and
the teacher alike.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_distil.errors import InputError

# The axis, from the last, that the tensor axis cuts: columns of what opens heads or feed-forward
# channels, rows of what closes them, the vocabulary's rows of the token embedding.
TENSOR_AXIS: dict[tuple[str, ...], int] = {
    **{(name, leaf): -1 for name in ("query", "key", "value", "up") for leaf in ("kernel", "bias")},
    **{(name, "kernel"): -2 for name in ("out", "down")},
    ("tokens", "embedding"): -2,
}


def shardings(tree: Any, mesh: Mesh, min_elements: int = 1 << 20) -> Any:
    """A `NamedSharding` for every array of `tree` (arrays, or their shapes).

    `TENSOR_AXIS` says what the tensor axis cuts. Then arrays of at least `min_elements` have their
    largest dimension that divides cut over fsdp. All else is replicated.

    Raises:
        InputError: a dimension that has to be cut does not divide; all such parameters are named.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    cuts = [cut(path, leaf.shape, mesh, min_elements) for path, leaf in leaves]
    if faults := [fault for one in cuts for fault in one.faults]:
        raise InputError(f"the mesh does not fit the model: {'; '.join(faults)}")
    return structure.unflatten(NamedSharding(mesh, one.spec) for one in cuts)


class Cut(NamedTuple):
    """Which axes of an array are cut over which mesh axes, and what does not divide."""

    spec: PartitionSpec
    faults: list[str]


def cut(path: tuple, shape: tuple[int, ...], mesh: Mesh, min_elements: int) -> Cut:
    """The cut of one parameter."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    tensor = _tensor_axis(names, shape, mesh.shape["tensor"])
    fsdp = None
    if math.prod(shape) >= min_elements:
        fsdp = _fsdp_axis(names, shape, mesh.shape["fsdp"], tensor)
    axes = {tensor: "tensor", fsdp: "fsdp"}
    spec = PartitionSpec(*(axes.get(axis) for axis in range(len(shape))))
    return Cut(spec, [fault for fault in (tensor, fsdp) if isinstance(fault, str)])


def _tensor_axis(names: list[str], shape: tuple[int, ...], size: int) -> int | str | None:
    """The axis that is cut over tensor, or why none is that has to be."""
    leaf = (names[-2], names[-1]) if len(names) > 1 else ()
    if leaf not in TENSOR_AXIS or size == 1:
        return None
    axis = len(shape) + TENSOR_AXIS[leaf]
    if shape[axis] % size == 0:
        return axis
    if leaf == ("tokens", "embedding"):  # multilingual vocabularies are odd: keep whole
        return None
    return (
        f"{'.'.join(names)} has {shape[axis]} channels, which do not divide over {size} tensor "
        "shards"
    )


def _fsdp_axis(
    names: list[str], shape: tuple[int, ...], size: int, tensor: int | str | None
) -> int | str | None:
    """The axis that is cut over fsdp, or why none is that has to be."""
    if size == 1:
        return None
    free = [axis for axis in range(len(shape)) if axis != tensor and shape[axis] % size == 0]
    if free:
        return max(free, key=lambda axis: shape[axis])
    if isinstance(tensor, int):
        return None  # it is cut already
    return (
        f"{'.'.join(names)} has no dimension of {' × '.join(map(str, shape))} left that divides "
        f"over {size} fsdp shards"
    )


def place(tree: Any, placed: Any) -> Any:
    """Host arrays, whole on every host, on the devices of `placed`; each host sends its part."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        tree,
        placed,
    )


def check_heads(heads: dict[str, int], mesh: Mesh) -> None:
    """Raises InputError unless the heads of each half divide over tensor: heads stay whole."""
    size = mesh.shape["tensor"]
    for half, count in heads.items():
        if count % size:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise InputError(
                f"{half}.layers.*.self_attention has {count} heads, which do not divide over "
                f"{size} tensor shards: use {fitting}"
            )
