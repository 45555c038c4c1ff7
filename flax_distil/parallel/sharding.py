"""Which device holds which part of which parameter: a rule over names and shapes.

Optimizer state repeats the parameters' names, so one rule serves parameters, gradients, moments and
the teacher alike.
"""

import math
from typing import Any

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
    faults: list[str] = []

    def placed(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, cut(path, leaf.shape, mesh, min_elements, faults))

    found = jax.tree_util.tree_map_with_path(placed, tree)
    if faults:
        raise InputError(f"the mesh does not fit the model: {'; '.join(faults)}")
    return found


def cut(
    path: tuple, shape: tuple[int, ...], mesh: Mesh, min_elements: int, faults: list[str]
) -> PartitionSpec:
    """The mesh axes that one array is cut over; what does not divide is added to `faults`."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    leaf = tuple(name.split(".")[-2:])
    axes: list[str | None] = [None] * len(shape)
    size = mesh.shape["tensor"]
    if size > 1 and leaf in TENSOR_AXIS:
        axis = TENSOR_AXIS[leaf]
        if shape[axis] % size == 0:
            axes[axis] = "tensor"
        elif leaf != ("tokens", "embedding"):  # multilingual vocabularies are odd: keep whole
            faults.append(
                f"{name} has {shape[axis]} channels, which do not divide over {size} tensor shards"
            )
    size = mesh.shape["fsdp"]
    if size > 1 and math.prod(shape) >= min_elements:
        free = [n for n, length in enumerate(shape) if not axes[n] and length % size == 0]
        if free:
            axes[max(free, key=lambda n: shape[n])] = "fsdp"
        elif "tensor" not in axes:
            faults.append(
                f"{name} has no dimension of {' × '.join(map(str, shape))} left that divides over "
                f"{size} fsdp shards"
            )
    return PartitionSpec(*axes)


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
