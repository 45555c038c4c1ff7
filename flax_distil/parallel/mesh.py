"""One mesh of three axes for every machine, from a single CPU device to a TPU pod; what lies where.

data: replicas that see different clips. fsdp: different clips too, and parameters and optimizer
state are spread over it. tensor: heads, feed-forward channels and the vocabulary are spread over
it, and its members see the same clips.

Optimizer state repeats the parameters' names, so one rule over names and shapes serves parameters,
gradients, moments and the teacher alike.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_distil.cache import compile_aside
from flax_distil.errors import InputError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# The axis, from the last, that the tensor axis cuts: columns of what opens heads or feed-forward
# channels, rows of what closes them, the vocabulary's rows of the token embedding.
TENSOR_AXIS: dict[tuple[str, ...], int] = {
    **{(name, leaf): -1 for name in ("query", "key", "value", "up") for leaf in ("kernel", "bias")},
    **{(name, "kernel"): -2 for name in ("out", "down")},
    ("tokens", "embedding"): -2,
}

# libtpu's names. An all-reduce becomes part of the matrix products beside it, and is not
# combined with those of gradients that are computed later.
OVERLAP: dict[str, str | bool] = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_jf_crs_combiner_threshold_in_bytes": str(2**20),
}
# Their 16 MiB of vector memory are not enough.
TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")


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


def on_each_device(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function` on every device's own clips and heads: [B, H, …] or [B] arrays in, [B, H, …] out.

    For kernels, which XLA does not partition. Where there is no mesh, or each device runs a program
    of its own already, it is called as it is.
    """
    if not in_mesh() or jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return function(*arrays)
    part = PartitionSpec(("data", "fsdp"), "tensor")
    places = tuple(part if x.ndim > 1 else BATCH for x in arrays)
    return jax.shard_map(function, in_specs=places, out_specs=part, check_vma=False)(*arrays)


def for_each_shard(x: Array, shards: int) -> Array:
    """`x` [G, …] for the G shards of a batch, each on its own devices.

    The gradient of each copy is summed over all its uses on the shard, and over devices once.
    """
    x_G = jnp.broadcast_to(x, (shards, *x.shape))
    if not in_mesh():
        return x_G
    free = (PartitionSpec.UNCONSTRAINED,) * x.ndim
    return jax.lax.with_sharding_constraint(x_G, PartitionSpec(*BATCH, *free))


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


@cache
def overlap_options(mesh: Mesh) -> dict[str, str | bool]:
    """Compiler options for a program that sums gradients over `mesh`; none but on newer TPUs.

    With them gradients cross a TPU's links while it computes (docs/LOG.md, 2026-11-25).
    Options disappear between versions: a compiler that does not know them compiles without.
    """
    chip = mesh.devices.flat[0]
    if mesh.size == 1 or chip.platform != "tpu" or chip.device_kind in TOO_SMALL:
        return {}
    nothing = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    same = jax.jit(lambda x: x).trace(nothing).lower(lowering_platforms=("tpu",))
    try:
        compile_aside(same, OVERLAP)
    except jax.errors.JaxRuntimeError as error:
        log.warning("gradients are reduced after the backward pass, not during it: %s", error)
        return {}
    return OVERLAP
