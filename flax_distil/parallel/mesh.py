"""One mesh of three axes for every machine, from a single CPU device to a TPU pod.

data: replicas that see different clips. fsdp: different clips too, and parameters and optimizer
state are spread over it. tensor: heads, feed-forward channels and the vocabulary are spread over
it, and its members see the same clips.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_distil.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A `data × fsdp × tensor` mesh over all devices; `data` = -1 takes what the others leave.

    Raises:
        InputError: the sizes do not multiply to the number of devices, the tensor axis crosses
            hosts, which read other clips each, or the devices are several TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    inner = fsdp * tensor
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise InputError(f"mesh {data} × {fsdp} × {tensor}: each size must be 1 or more")
    if data == -1:
        data = len(devices) // inner
    if data * inner != len(devices):
        raise InputError(
            f"mesh {data} × {fsdp} × {tensor} is for {data * inner} devices and {len(devices)} are "
            f"here: choose fsdp × tensor that divides {len(devices)} and data = -1"
        )
    arranged = np.array(devices).reshape(data, fsdp, tensor)
    if devices[0].platform == "tpu":
        arranged = along_torus(arranged.shape, devices)
    clips = arranged.reshape(-1, tensor)
    if any(len({device.process_index for device in members}) > 1 for members in clips):
        raise InputError(
            f"mesh {data} × {fsdp} × {tensor}: the tensor axis crosses hosts, of which each reads "
            "clips of its own: choose a smaller tensor, and fsdp for the rest"
        )
    return Mesh(arranged, AXES, (AxisType.Auto,) * 3)


def along_torus(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """TPUs arranged so that neighbours in the mesh are linked."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        raise InputError(
            f"a mesh is for one TPU slice and {len(slices)} are available: launch on each"
        )
    try:
        return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices).devices
    except NotImplementedError:  # an axis is only a part of the torus's
        return create_device_mesh(shape, devices, allow_split_physical_axes=True)


def data_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def within(mesh: Mesh) -> Any:
    """A context in which functions are traced for this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def in_mesh() -> bool:
    """Whether a function is traced `within` a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def on_each_device(function: Callable[..., Array], *arrays_BH: Array) -> Array:
    """`function` on every device's own clips and heads: [B, H, …] arrays in and out.

    For kernels, which XLA does not partition. Where there is no mesh, or each device runs a program
    of its own already, it is called as it is.
    """
    if not in_mesh() or jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return function(*arrays_BH)
    part = PartitionSpec(("data", "fsdp"), "tensor")
    return jax.shard_map(
        function, in_specs=(part,) * len(arrays_BH), out_specs=part, check_vma=False
    )(*arrays_BH)


def for_each_shard(x: Array, shards: int) -> Array:
    """`x` [G, …] for the G shards of a batch, each on its own devices.

    The gradient of each copy is summed over all its uses on the shard, and over devices once.
    """
    x_G = jnp.broadcast_to(x, (shards, *x.shape))
    if not in_mesh():
        return x_G
    free = (PartitionSpec.UNCONSTRAINED,) * x.ndim
    return jax.lax.with_sharding_constraint(x_G, PartitionSpec(*BATCH, *free))


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises InputError unless a batch divides over the data shards and their micro-batches."""
    shards = data_shards(mesh)
    parts = shards * accumulation
    if batch_size > 0 and batch_size % parts == 0:
        return
    below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
    remedy = f"{below} or {above}" if below > 0 else f"{max(above, parts)}"
    micro = f" of {accumulation} micro-batches each" if accumulation > 1 else ""
    raise InputError(
        f"batch {batch_size} does not divide over {shards} data shards{micro}: use {remedy}"
    )
