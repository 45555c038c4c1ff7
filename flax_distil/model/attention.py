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

from flax_distil.model.precision import product
from flax_distil.parallel.mesh import in_mesh, on_each_device, on_tpu

QUERY_BLOCK = 300  # queries at a time where they divide: 1500 audio positions are 5 blocks
KERNEL_BLOCK = 512  # queries and keys at a time of the TPU kernel: what a v4's on-chip memory holds
LANES = 128  # blocks of the kernel are multiples
FEW_QUERIES = 8  # of all heads, they fill one pass or two of a TPU's matrix unit


def attention(
    q_BHQK: Float[Array, "B H Q K"],
    k_BHSK: Float[Array, "B H S K"],
    v_BHSK: Float[Array, "B H S K"],
    mask_QS: Bool[Array, "... Q S"] | None = None,
    kv_length: int | None = None,
) -> Float[Array, "B H Q K"]:
    """Softmax(q kᵀ) v; `q` comes scaled. True in `mask_QS` means «may look».

    kv_length: how many keys there are, where those behind them only fill up (`pad_to_block`).

    Unmasked attention of many queries (the encoder's) runs in parts, so that its scores, the
    model's largest tensor, never exist whole: blocks of queries, or on CPUs, where a part has to
    stay in cache, one head of one clip. In bfloat16 on a TPU mesh (`parallel.mesh.within`) all
    unmasked attention, a whole text's to the audio too, runs in a kernel whose scores stay on the
    chip (docs/LOG.md); on NVIDIA's GPUs the encoder's runs in cuDNN's.

    Unmasked, `q` may have n rows to each row of `k` and `v`: beams that look at one clip.
    """
    batch, heads, queries, size = q_BHQK.shape
    clips = k_BHSK.shape[0]
    if clips != batch and mask_QS is None:
        beams_BHNK = q_BHQK.reshape(clips, -1, heads, queries, size).swapaxes(1, 2)
        mixed = attention(beams_BHNK.reshape(clips, heads, -1, size), k_BHSK, v_BHSK)
        return mixed.reshape(beams_BHNK.shape).swapaxes(1, 2).reshape(q_BHQK.shape)
    if mask_QS is None and takes_kernel(queries, q_BHQK.dtype):
        return on_each_device(partial(_by_kernel, kv_length=kv_length), q_BHQK, k_BHSK, v_BHSK)
    if mask_QS is not None or queries <= QUERY_BLOCK:
        return _attend(q_BHQK, k_BHSK, v_BHSK, mask_QS)
    if q_BHQK.dtype in (jnp.bfloat16, jnp.float16) and has_cudnn():
        by_cudnn = partial(on_each_device, _by_cudnn) if in_mesh() else _by_cudnn
        return by_cudnn(q_BHQK, k_BHSK, v_BHSK)
    return jax.lax.platform_dependent(
        *(q_BHQK, k_BHSK, v_BHSK), cpu=_by_head, default=_by_query_block
    )


def takes_kernel(queries: int, dtype: Any) -> bool:
    """Whether unmasked attention of so many queries runs in the TPU kernel."""
    return on_tpu() and dtype == jnp.bfloat16 and queries >= LANES


def pad_to_block(x_BSD: Float[Array, "B S D"], queries: int) -> Float[Array, "B T D"]:
    """Positions filled up for the kernel, if so many queries will look at them in it.

    Once for all layers: to fill up each one's queries, keys and values takes a quarter of an
    encoder's time (docs/LOG.md).
    """
    positions = x_BSD.shape[1]
    if not takes_kernel(queries, x_BSD.dtype):
        return x_BSD
    return jnp.pad(x_BSD, ((0, 0), (0, -positions % _block(positions)), (0, 0)))


@cache
def has_cudnn() -> bool:
    """Whether this process computes on GPUs that cuDNN has a fused attention for."""
    chip = jax.local_devices()[0]
    nvidia = chip.platform == "gpu" and "NVIDIA" in chip.device_kind
    return nvidia and float(chip.compute_capability) >= 8.0  # Ampere


def attend_side_by_side(
    q_BQD: Float[Array, "B Q D"],
    k_CSD: Float[Array, "C S D"],
    v_CSD: Float[Array, "C S D"],
    heads: int,
    mask_QS: Bool[Array, "... Q S"] | None = None,
) -> Float[Array, "B Q D"]:
    """`attention` of few queries to keys whose heads lie beside each other, D = H K.

    For each head the query is there once, with zeros in place of the others, and is multiplied with
    whole keys. That is H times the products, which a TPU has time for while it reads the keys; with
    heads of their own it needs more time to turn them than to read them (docs/LOG.md).

    Unmasked, `q` may have n rows to each row of `k` and `v`.
    """
    clips, _, width = k_CSD.shape
    own_HD = np.arange(width) // (width // heads) == np.arange(heads)[:, None]
    q_CQHD = q_BQD.reshape(clips, -1, 1, width) * own_HD.astype(q_BQD.dtype)
    scores_CQHS = product("cqhd,csd->cqhs", q_CQHD, k_CSD)
    if mask_QS is not None:
        mask_QHS = mask_QS[:, None] if mask_QS.ndim == 2 else mask_QS.swapaxes(1, 2)
        scores_CQHS = jnp.where(mask_QHS, scores_CQHS, jnp.finfo(scores_CQHS.dtype).min)
    weights = jnp.exp(scores_CQHS - scores_CQHS.max(axis=-1, keepdims=True))
    mixed_CQHD = product("cqhs,csd->cqhd", weights.astype(v_CSD.dtype), v_CSD)
    mixed_CQHD = mixed_CQHD / weights.sum(axis=-1, keepdims=True)
    return (mixed_CQHD * own_HD).sum(axis=2).reshape(q_BQD.shape).astype(q_BQD.dtype)


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


def _by_cudnn(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array) -> Array:
    """cuDNN's flash attention."""
    turn = lambda x: x.swapaxes(1, 2)
    turned = map(turn, (q_BHQK, k_BHSK, v_BHSK))
    return turn(jax.nn.dot_product_attention(*turned, scale=1.0, implementation="cudnn"))


def _by_kernel(
    q_BHQK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    kv_length: int | None = None,
    interpret: bool = False,
) -> Array:
    """Splash attention, what is no whole block filled up. interpret: compute it anywhere."""
    queries, keys = q_BHQK.shape[2], k_BHSK.shape[2]
    blocks = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _block(x.shape[2])), (0, 0)))
        for x in (q_BHQK, k_BHSK, v_BHSK)
    )
    kernel = _splash(q_BHQK.shape[1], queries, keys, kv_length or keys, interpret)
    return jax.vmap(kernel)(*blocks)[:, :, :queries]


@cache
def _splash(heads: int, queries: int, keys: int, kv_length: int, interpret: bool) -> Any:
    """The kernel for one clip; keys behind those that are kv_length are masked out."""
    block, of_keys = _block(queries), _block(keys)
    whole = (queries + -queries % block, keys + -keys % of_keys)
    mask_QS = splash_attention_mask.NumpyMask(
        np.broadcast_to(np.arange(whole[1]) < kv_length, whole)
    )
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
    scores = product("bhqk,bhsk->bhqs", q_BHQK, k_BHSK)
    if mask_QS is not None:
        scores = jnp.where(mask_QS, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = product("bhqs,bhsk->bhqk", weights.astype(v_BHSK.dtype), v_BHSK)
    return (mixed / total).astype(q_BHQK.dtype)
