"""Multi-head attention, once for every device: scores and softmax in float32, no score tensor kept.

Letters: see `flax_distil.model.whisper`. Q and S are query and key positions.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float

from flax_distil.parallel.mesh import in_mesh, on_each_device

QUERY_BLOCK = 300  # queries at a time where they divide: 1500 audio positions are 5 blocks
KERNEL_BLOCK = 512  # queries and keys at a time of the TPU kernel: what a v4's on-chip memory holds
LANES = 128  # blocks of the kernel are multiples


def attention(
    q_BHQK: Float[Array, "B H Q K"],
    k_BHSK: Float[Array, "B H S K"],
    v_BHSK: Float[Array, "B H S K"],
    mask_QS: Bool[Array, "... Q S"] | None = None,
) -> Float[Array, "B H Q K"]:
    """Softmax(q kᵀ) v; `q` comes scaled. True in `mask_QS` means «may look».

    Unmasked attention of many queries (the encoder's) runs in parts, so that its scores, the
    model's largest tensor, never exist whole: blocks of queries, or on CPUs, where a part has to
    stay in cache, one head of one clip. In bfloat16 on a TPU mesh (`parallel.mesh.within`) all
    unmasked attention, a whole text's to the audio too, runs in a kernel whose scores stay on the
    chip (docs/LOG.md).

    Unmasked, `q` may have n rows to each row of `k` and `v`: beams that look at one clip.
    """
    batch, heads, queries, size = q_BHQK.shape
    clips = k_BHSK.shape[0]
    if clips != batch and mask_QS is None:
        beams_BHNK = q_BHQK.reshape(clips, -1, heads, queries, size).swapaxes(1, 2)
        mixed = attention(beams_BHNK.reshape(clips, heads, -1, size), k_BHSK, v_BHSK)
        return mixed.reshape(beams_BHNK.shape).swapaxes(1, 2).reshape(q_BHQK.shape)
    kernel = in_mesh() and q_BHQK.dtype == jnp.bfloat16 and queries >= LANES
    many = queries > QUERY_BLOCK
    if mask_QS is not None or not (kernel or many):
        return _attend(q_BHQK, k_BHSK, v_BHSK, mask_QS)
    blocks = _by_query_block if many else _attend
    return jax.lax.platform_dependent(
        *(q_BHQK, k_BHSK, v_BHSK),
        cpu=_by_head if many else _attend,
        tpu=_by_kernel_on_each_device if kernel else blocks,
        default=blocks,
    )


def _by_head(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array) -> Array:
    """One head of one clip after the other."""
    heads = [x.reshape(-1, 1, 1, *x.shape[2:]) for x in (q_BHQK, k_BHSK, v_BHSK)]
    attend = jax.checkpoint(lambda qkv: _attend(qkv[0], qkv[1], qkv[2], None))
    return jax.lax.map(attend, tuple(heads)).reshape(q_BHQK.shape)


def _by_query_block(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array) -> Array:
    """A block of queries of all heads and clips after the other; at once if they do not divide."""
    batch, heads, queries, size = q_BHQK.shape
    if queries % QUERY_BLOCK:
        return _attend(q_BHQK, k_BHSK, v_BHSK, None)
    blocks = q_BHQK.reshape(batch, heads, -1, QUERY_BLOCK, size)
    attend = jax.checkpoint(lambda q_BHQK: _attend(q_BHQK, k_BHSK, v_BHSK, None))
    mixed = jax.lax.map(attend, jnp.moveaxis(blocks, 2, 0))
    return jnp.moveaxis(mixed, 0, 2).reshape(q_BHQK.shape)


def _by_kernel_on_each_device(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array) -> Array:
    return on_each_device(_by_kernel, q_BHQK, k_BHSK, v_BHSK)


def _by_kernel(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, interpret: bool = False) -> Array:
    """Splash attention, positions filled up to whole blocks. interpret: compute it anywhere."""
    queries, keys = q_BHQK.shape[2], k_BHSK.shape[2]
    filled = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _block(x.shape[2])), (0, 0)))
        for x in (q_BHQK, k_BHSK, v_BHSK)
    )
    kernel = _splash(q_BHQK.shape[1], queries, keys, interpret)
    return jax.vmap(kernel)(*filled)[:, :, :queries]


@cache
def _splash(heads: int, queries: int, keys: int, interpret: bool) -> Any:
    """The kernel for one clip; keys beyond the real ones are masked out."""
    block, of_keys = _block(queries), _block(keys)
    filled = (queries + -queries % block, keys + -keys % of_keys)
    mask_QS = splash_attention_mask.NumpyMask(np.broadcast_to(np.arange(filled[1]) < keys, filled))
    sizes: dict[str, Any] = {f"block_{name}": block for name in ("q", "q_dkv", "q_dq")}
    names = ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")
    sizes |= {f"block_{name}": of_keys for name in names}
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask_QS] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _block(length: int) -> int:
    """Positions at a time, of a text or of the audio: whole lanes."""
    return min(KERNEL_BLOCK, length + -length % LANES)


def _attend(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, mask_QS: Array | None = None) -> Array:
    """Normalises after the value product: dividing [Q, K] numbers instead of [Q, S]."""
    wide = jnp.promote_types(q_BHQK.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=wide)
    scores = product("bhqk,bhsk->bhqs", q_BHQK, k_BHSK)
    if mask_QS is not None:
        scores = jnp.where(mask_QS, scores, jnp.finfo(wide).min)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = product("bhqs,bhsk->bhqk", weights.astype(v_BHSK.dtype), v_BHSK)
    return (mixed / total).astype(q_BHQK.dtype)
