"""Sums of bits: whether copies on different devices are equal, and what a disk gives back is right.

Data parallelism keeps a copy of every parameter on each device of the data axis and gives all of
them the same updates. A fault of hardware, or a program that is not deterministic, can make them
differ unnoticed: the loss is an average over all, and a checkpoint holds the first copy alone. So
before each checkpoint every device sums the bits of its parts, in one pass over the state. The
checkpoint holds these sums as well, because Orbax does not verify what it reads.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from flax_distil.errors import InputError
from flax_distil.parallel.mesh import make_mesh


def check_replicas(tree: Any, step: int) -> dict[str, int]:
    """The sums of the arrays' bits, by name. All hosts call it at once.

    Raises:
        InputError: copies on different devices differ.
    """
    sums, differing = bit_sums(tree)
    if differing:
        raise InputError(
            f"at step {step} the copies of {first_three(differing)} on different devices are not "
            "the same: a device is faulty. Continue from the last checkpoint (--run.resume must), "
            "on other devices if it happens again"
        )
    return sums


def check_sums(arrays: Any, progress: Any, saved: Mapping[str, int] | None, folder: Path) -> None:
    """Raises InputError if arrays or JSON were read from `folder` that are not what was saved.

    saved: their sums; None in checkpoints of versions that wrote none, which are not compared.
    """
    if saved is None:
        return
    sums, _ = bit_sums(arrays)
    if progress is not None:
        sums["progress"] = json_sum(progress)
    if damaged := [name for name, value in sums.items() if value != saved.get(name)]:
        raise InputError(
            f"{folder} is damaged: {first_three(damaged)} cannot be what was saved. Delete this "
            "folder to go on from the checkpoint before it"
        )


def first_three(names: list[str]) -> str:
    """Three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def json_sum(values: Any) -> int:
    """A sum of what is written as JSON."""
    return crc32(json.dumps(values, sort_keys=True).encode())


def bit_sums(tree: Any) -> tuple[dict[str, int], list[str]]:
    """The sum of each array's numbers read as unsigned integers, modulo 2^32, by its name: the same
    on any mesh. And the names of arrays whose copies on different devices differ."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    placed = [getattr(leaf, "sharding", None) for _, leaf in named]
    meshes = (one.mesh for one in placed if isinstance(one, NamedSharding))
    mesh = next(meshes, None) or make_mesh(devices=jax.local_devices()[:1])
    specs = tuple(getattr(one, "spec", PartitionSpec()) for one in placed)
    by_device = jax.device_get(device_sums([leaf for _, leaf in named], mesh, specs))
    sums, differing = {}, []
    for (path, _), spec, column in zip(named, specs, by_device.T, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        cut = jax.tree.leaves(tuple(spec))  # an array has copies along all other axes of the mesh
        copied = tuple(n for n, axis in enumerate(mesh.axis_names) if axis not in cut)
        of_devices = column.reshape(mesh.axis_sizes)
        parts = of_devices.min(axis=copied)
        if (parts != of_devices.max(axis=copied)).any():
            differing.append(name)
        sums[name] = int(parts.sum(dtype=np.uint32))
    return sums, differing


@partial(jax.jit, static_argnames=("mesh", "specs"))
def device_sums(
    leaves: list[Array], mesh: Mesh, specs: tuple[PartitionSpec, ...]
) -> UInt32[Array, "devices n"]:
    """What each device holds of each array, its bits summed; every host gets all sums."""

    def bits(part: Array) -> UInt32[Array, ""]:
        unsigned = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(part, unsigned), dtype=jnp.uint32)

    def of_device(parts: list[Array]) -> UInt32[Array, "devices n"]:
        return jax.lax.all_gather(jnp.stack([bits(part) for part in parts]), mesh.axis_names)

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(list(specs),), out_specs=everywhere, check_vma=False
    )(leaves)
