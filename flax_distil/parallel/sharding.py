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

    Tensor axis: see `TENSOR_AXIS`. Then arrays of at least `min_elements` have their largest
    dimension that divides cut over fsdp. All else is replicated.

    Raises:
        InputError: a dimension that has to be cut does not divide; all such parameters are named.
    """
    faults: list[str] = []

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
        )
        spec = _tensor(names, leaf.shape, mesh.shape["tensor"], faults)
        if math.prod(leaf.shape) >= min_elements:
            _fsdp(names, leaf.shape, mesh.shape["fsdp"], spec, faults)
        return NamedSharding(mesh, PartitionSpec(*spec))

    placed = jax.tree_util.tree_map_with_path(place, tree)
    if faults:
        raise InputError(f"the mesh does not fit the model: {'; '.join(faults)}")
    return placed


def place(tree: Any, placed: Any) -> Any:
    """Host arrays, which every host has whole, where `shardings` says; each host sends its part."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        tree,
        placed,
    )


def _tensor(
    names: tuple[str, ...], shape: tuple[int, ...], size: int, faults: list[str]
) -> list[str | None]:
    spec: list[str | None] = [None] * len(shape)
    if names[-2:] not in TENSOR_AXIS or size == 1:
        return spec
    axis = TENSOR_AXIS[names[-2:]]
    if shape[axis] % size == 0:
        spec[axis] = "tensor"
    elif names[-2:] != ("tokens", "embedding"):  # multilingual vocabularies are odd: keep whole
        faults.append(
            f"{'.'.join(names)} has {shape[axis]} channels, which do not divide over {size} "
            "tensor shards"
        )
    return spec


def _fsdp(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    size: int,
    spec: list[str | None],
    faults: list[str],
) -> None:
    if size == 1:
        return
    free = [axis for axis in range(len(shape)) if spec[axis] is None and shape[axis] % size == 0]
    if not free and "tensor" in spec:
        return  # already cut
    if not free:
        faults.append(
            f"{'.'.join(names)} has no dimension of {' × '.join(map(str, shape))} left that "
            f"divides over {size} fsdp shards"
        )
        return
    spec[max(free, key=lambda axis: shape[axis])] = "fsdp"


def check_heads(heads: dict[str, int], mesh: Mesh) -> None:
    """Raises InputError unless heads, by half, divide over tensor: a cut head cannot attend."""
    size = mesh.shape["tensor"]
    for half, count in heads.items():
        if count % size:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise InputError(
                f"{half}.layers.*.self_attention has {count} heads, which do not divide over "
                f"{size} tensor shards: use {fitting}"
            )
