"""Whether the copies of a state on different devices are still equal, to the last bit.

Data parallelism keeps a copy of every parameter on each device of the data axis and gives all of
them the same updates. A fault of hardware, or a program that is not deterministic, can make them
differ unnoticed: the loss is an average over all, and a checkpoint holds the first copy alone. So
before each checkpoint each device sums the bits of its parts, in one pass over the state.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from flax_distil.errors import InputError
from flax_distil.parallel.mesh import AXES


def check_replicas(state: Any, mesh: Mesh, step: int) -> None:
    """Raises InputError if copies differ; all hosts have to call it."""
    names = differing(state, mesh)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"at step {step} the copies of {', '.join(names[:3])}{more} on different devices are "
            "not the same: a device is faulty. Continue from the last checkpoint "
            "(--run.resume must), on other devices if it happens again"
        )


def differing(tree: Any, mesh: Mesh) -> list[str]:
    """The arrays whose copies are not the same; an array has copies along every axis of the mesh
    that it is not cut over."""
    if mesh.size == 1:
        return []
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    specs = tuple(leaf.sharding.spec for _, leaf in leaves)
    sums = np.asarray(_checksums(mesh, specs)([leaf for _, leaf in leaves]))
    found = []
    for (path, _), spec, of_devices in zip(leaves, specs, np.moveaxis(sums, -1, 0), strict=True):
        copied = [number for number, axis in enumerate(AXES) if axis not in str(spec)]
        if any((of_devices != of_devices.take([0], axis=number)).any() for number in copied):
            found.append(jax.tree_util.keystr(path, simple=True, separator="."))
    return found


@cache
def _checksums(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
    """The program: uint32[data, fsdp, tensor, arrays], known to every host."""

    def of_device(leaves: list[Array]) -> UInt32[Array, "1 1 1 n"]:
        return jnp.stack([bits(leaf) for leaf in leaves])[None, None, None]

    everywhere = NamedSharding(mesh, PartitionSpec())
    sharded = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(list(specs),),
        out_specs=PartitionSpec(*AXES),
        check_vma=False,
    )
    return jax.jit(sharded, out_shardings=everywhere)


def bit_sums(tree: Any) -> dict[str, int]:
    """The bits of every array by its name, summed: the same on any mesh. All hosts call it at
    once."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    sums = np.asarray(_bit_sums([leaf for _, leaf in leaves]))
    return dict(zip(names, sums.tolist(), strict=True))


@jax.jit
def _bit_sums(leaves: list[Array]) -> UInt32[Array, " n"]:
    return jnp.stack([bits(leaf) for leaf in leaves])


def bits(x: Array) -> UInt32[Array, ""]:
    """The sum of an array's numbers read as unsigned integers, modulo 2^32."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)
