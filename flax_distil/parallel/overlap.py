"""Gradients that cross a TPU's links while it computes.

The TPU compiler does so only with these options (docs/LOG.md, 2026-11-25).
"""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flax_distil.cache import compile_aside
from flax_distil.parallel.mesh import replicated

log = logging.getLogger(__name__)

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


@cache
def overlap_options(mesh: Mesh) -> dict[str, str | bool]:
    """Compiler options for a program that sums gradients over `mesh`; none but on newer TPUs.

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
