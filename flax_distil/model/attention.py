"""Multi-head attention: projections, two layouts of keys and values, a backend for each device.

`Spec.attention` names the backend, which `attention_for` chooses for a device. Each computes
the same; scores and softmax are float32, and no score tensor is kept.

Letters: see `flax_distil.model.whisper`. Q and S are query and key positions.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from flax_distil.model.precision import precision, product
from flax_distil.parallel.mesh import on_each_device

Backend = Literal["xla", "cpu", "cudnn", "splash"]

QUERY_BLOCK = 300  # queries at a time where they divide: 1500 audio positions are 5 blocks
KERNEL_BLOCK = 512  # queries and keys at a time in the TPU kernel: what a v4's vector memory holds
LANES = 128  # blocks of the TPU kernel are multiples of this
FEW_QUERIES = 8  # of all heads, they fill one or two passes of a TPU's matrix unit


def attention_for(device: Any, dtype: Any) -> Backend:
    """The fastest backend on a `jax.Device` (or one to compile for) in this dtype."""
    if device.platform in ("tpu", "cpu"):
        return "splash" if device.platform == "tpu" else "cpu"
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    nvidia = device.platform == "gpu" and "NVIDIA" in device.device_kind
    ampere = nvidia and float(device.compute_capability) >= 8.0
    return "cudnn" if half and ampere else "xla"


class KeyValues(NamedTuple):
    """Keys and values with their heads split, [B H S K] each; a leading N when stacked."""

    keys: Array
    values: Array


class MergedKeyValues(NamedTuple):
    """Keys and values with their heads merged, [B S D] each: they fill a TPU's tiles."""

    keys: Array
    values: Array


AnyKeyValues = KeyValues | MergedKeyValues


def batch_axis(kv: AnyKeyValues) -> int:
    """The axis of the batch: not the first where the layers are stacked."""
    return kv.keys.ndim - (4 if isinstance(kv, KeyValues) else 3)


class Attention(nnx.Module):
    """Projections around `attend`; Whisper's keys have no bias."""

    def __init__(self, width: int, heads: int, dtype: Any, backend: Backend, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear, width, width, dtype=dtype, precision=precision(dtype), rngs=rngs
        )
        self.query = linear()
        self.key = linear(use_bias=False)
        self.value = linear()
        self.out = linear()
        self.heads = heads
        self.backend: Backend = backend

    def keys_values(self, x_BSD: Float[Array, "B S D"]) -> KeyValues:
        """Keys and values of these positions, [B H S K] each."""
        return KeyValues(self.to_heads(self.key, x_BSD), self.to_heads(self.value, x_BSD))

    def cached_keys_values(self, x_BSD: Float[Array, "B S D"]) -> AnyKeyValues:
        """The same, in the layout in which a cache of them decodes fastest."""
        if self.backend == "splash":
            return MergedKeyValues(self.key(x_BSD), self.value(x_BSD))
        return self.keys_values(x_BSD)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        kv: AnyKeyValues,
        mask_QS: Bool[Array, "... L S"] | None = None,
        kv_length: int | Int[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """What the positions x take from `kv`; mask and kv_length as of `attend`."""
        scale = (x_BLD.shape[-1] // self.heads) ** -0.5
        if isinstance(kv, MergedKeyValues):
            if x_BLD.shape[1] <= FEW_QUERIES:
                q_BLD = self.query(x_BLD) * scale
                return self.out(attend_merged(q_BLD, *kv, self.heads, mask_QS))
            kv = KeyValues(self.split(kv.keys), self.split(kv.values))
        q_BHLK = self.to_heads(self.query, x_BLD) * scale
        return self.from_heads(attend(q_BHLK, *kv, mask_QS, kv_length, self.backend))

    def scores(self, x_BLD: Float[Array, "B L D"], kv: KeyValues) -> Float[Array, "B H L S"]:
        """Scaled products of queries and keys, before the softmax."""
        q_BHLK = self.to_heads(self.query, x_BLD)
        return q_BHLK.shape[-1] ** -0.5 * product("bhlk,bhsk->bhls", q_BHLK, kv.keys)

    def to_heads(self, linear: nnx.Linear, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
        """A projection with its heads split: heads before time decode fastest."""
        if self.backend != "splash":
            return self.split(linear(x_BLD))
        split, bias = (x_BLD.shape[-1], self.heads, -1), (1, self.heads, 1, -1)
        return _project("bld,dhk->bhlk", x_BLD, linear, split, bias)

    def from_heads(self, x_BHLK: Float[Array, "B H L K"]) -> Float[Array, "B L D"]:
        """The output projection of all heads."""
        batch, heads, length, size = x_BHLK.shape
        if self.backend != "splash":
            return self.out(x_BHLK.swapaxes(1, 2).reshape(batch, length, heads * size))
        return _project("bhlk,hkd->bld", x_BHLK, self.out, (heads, size, -1), (1, 1, -1))

    def split(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
        """Channels to heads."""
        batch, length, width = x_BLD.shape
        return x_BLD.reshape(batch, length, self.heads, width // self.heads).swapaxes(1, 2)


def _project(
    subscripts: str, x: Array, linear: nnx.Linear, kernel: tuple[int, ...], bias: tuple[int, ...]
) -> Array:
    """`linear` as one product in another layout: on TPUs a transposition would take as long.

    kernel, bias: their shapes in it.
    """
    dtype = linear.dtype
    weight = linear.kernel[...].astype(dtype).reshape(kernel)
    y = jnp.einsum(subscripts, x.astype(dtype), weight, precision=precision(dtype))
    return y if linear.bias is None else y + linear.bias[...].astype(dtype).reshape(bias)


def append(cache: AnyKeyValues, new: AnyKeyValues, at: Int[Array, "..."]) -> AnyKeyValues:
    """A cache with new keys and values behind the `at` known ones; `at` is a scalar or [B]."""
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)

    def both(cache: Array, new: Array) -> Array:
        new = new.astype(cache.dtype)
        if at.ndim == 0:
            return write(cache, new, at)
        if cache.ndim == 4:
            return jax.vmap(write)(cache, new, at)
        # A TPU would write one row after the other, in a loop; all at once takes less time.
        for index in range(new.shape[1]):
            here_BS1 = (jnp.arange(cache.shape[1])[None] == at[:, None] + index)[..., None]
            cache = jnp.where(here_BS1, new[:, index, None], cache)
        return cache

    return jax.tree.map(both, cache, new)


def attend(
    q_BHQK: Float[Array, "B H Q K"],
    k_BHSK: Float[Array, "C H S K"],
    v_BHSK: Float[Array, "C H S K"],
    mask_QS: Bool[Array, "... Q S"] | None = None,
    kv_length: int | Int[Array, " B"] | None = None,
    backend: Backend = "xla",
) -> Float[Array, "B H Q K"]:
    """Softmax(q kᵀ) v; `q` comes scaled.

    Args:
        q_BHQK: queries. Unmasked, they may have n rows to each row of keys: beams of one clip.
        k_BHSK: keys.
        v_BHSK: values.
        mask_QS: true where a query may attend to a key.
        kv_length: keys that count, of all clips or of each; those behind them are padding.
        backend: of unmasked attention of many queries, the encoder's, whose scores are the
            model's largest tensor and never exist whole.
    """
    if mask_QS is not None:
        return _attend(q_BHQK, k_BHSK, v_BHSK, mask_QS)
    batch, heads, queries, size = q_BHQK.shape
    clips = k_BHSK.shape[0]
    if clips != batch:
        beams = q_BHQK.reshape(clips, -1, heads, queries, size).swapaxes(1, 2)
        rows_BHQK = beams.reshape(clips, heads, -1, size)
        mixed_BHQK = attend(rows_BHQK, k_BHSK, v_BHSK, None, kv_length, backend)
        return mixed_BHQK.reshape(beams.shape).swapaxes(1, 2).reshape(q_BHQK.shape)
    if takes_kernel(backend, queries, q_BHQK.dtype):
        return _by_splash(q_BHQK, k_BHSK, v_BHSK, kv_length)
    lengths_B = None if kv_length is None or isinstance(kv_length, int) else kv_length
    if queries <= QUERY_BLOCK:
        return _attend(q_BHQK, k_BHSK, v_BHSK, lengths_B=lengths_B)
    return IN_PARTS[backend](q_BHQK, k_BHSK, v_BHSK, lengths_B)


def takes_kernel(backend: Backend, queries: int, dtype: Any) -> bool:
    """Whether unmasked attention of so many queries runs in the TPU kernel: in bfloat16 alone."""
    return backend == "splash" and dtype == jnp.bfloat16 and queries >= LANES


def pad_to_block(
    x_BSD: Float[Array, "B S D"], queries: int, backend: Backend
) -> Float[Array, "B T D"]:
    """Positions padded to whole blocks of the TPU kernel, if `queries` attend to them in it.

    Once for all layers: padding queries, keys and values of each takes a quarter of an encoder's
    time (docs/LOG.md).
    """
    positions = x_BSD.shape[1]
    if not takes_kernel(backend, queries, x_BSD.dtype):
        return x_BSD
    return jnp.pad(x_BSD, ((0, 0), (0, -positions % _block(positions)), (0, 0)))


def attend_merged(
    q_BQD: Float[Array, "B Q D"],
    k_CSD: Float[Array, "C S D"],
    v_CSD: Float[Array, "C S D"],
    heads: int,
    mask_QS: Bool[Array, "... Q S"] | None = None,
) -> Float[Array, "B Q D"]:
    """`attend` of few queries to keys whose heads are merged, D = H K.

    For each head the query is repeated, with zeros in place of the other heads, and multiplied with
    whole keys. That is H times the products, for which a TPU has time while it reads the keys; with
    split heads it takes longer to transpose them than to read them (docs/LOG.md).

    Unmasked, `q` may have n rows to each row of `k` and `v`.
    """
    clips, _, width = k_CSD.shape
    own_HD = np.arange(width) // (width // heads) == np.arange(heads)[:, None]
    own_11HD = own_HD[None, None]
    q_CQHD = q_BQD.reshape(clips, -1, 1, width) * own_11HD.astype(q_BQD.dtype)
    scores_CQHS = product("cqhd,csd->cqhs", q_CQHD, k_CSD)
    if mask_QS is not None:
        mask_CQHS = mask_QS[None, :, None] if mask_QS.ndim == 2 else mask_QS.swapaxes(1, 2)
        scores_CQHS = jnp.where(mask_CQHS, scores_CQHS, jnp.finfo(scores_CQHS.dtype).min)
    weights = jnp.exp(scores_CQHS - scores_CQHS.max(axis=-1, keepdims=True))
    mixed_CQHD = product("cqhs,csd->cqhd", weights.astype(v_CSD.dtype), v_CSD)
    mixed_CQHD = mixed_CQHD / weights.sum(axis=-1, keepdims=True)
    return (mixed_CQHD * own_11HD).sum(axis=2).reshape(q_BQD.shape).astype(q_BQD.dtype)


def _attend(
    q_BHQK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    mask_QS: Array | None = None,
    lengths_B: Array | None = None,
) -> Array:
    """Normalises after the value product: dividing [Q, K] numbers instead of [Q, S]."""
    scores = product("bhqk,bhsk->bhqs", q_BHQK, k_BHSK)
    if lengths_B is not None:
        mask_QS = jnp.arange(k_BHSK.shape[2]) < lengths_B.reshape(-1, 1, 1, 1)
    if mask_QS is not None:
        mask_BHQS = jax.lax.expand_dims(mask_QS, range(4 - mask_QS.ndim))
        scores = jnp.where(mask_BHQS, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = product("bhqs,bhsk->bhqk", weights.astype(v_BHSK.dtype), v_BHSK)
    return (mixed / total).astype(q_BHQK.dtype)


def _by_head(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, lengths_B: Array | None = None) -> Array:
    """One head of one clip after the other: on CPUs, a part has to stay in the cache."""
    heads = tuple(x.reshape(-1, 1, 1, *x.shape[2:]) for x in (q_BHQK, k_BHSK, v_BHSK))
    lengths = None if lengths_B is None else jnp.repeat(lengths_B, q_BHQK.shape[1])
    head_by_head = jax.checkpoint(lambda given: _attend(*given[0], lengths_B=given[1]))
    return jax.lax.map(head_by_head, (heads, lengths)).reshape(q_BHQK.shape)


def _by_query_block(
    q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, lengths_B: Array | None = None
) -> Array:
    """A block of queries of all heads and clips after the other; at once if they do not divide."""
    batch, heads, queries, size = q_BHQK.shape
    if queries % QUERY_BLOCK:
        return _attend(q_BHQK, k_BHSK, v_BHSK, lengths_B=lengths_B)
    blocks = q_BHQK.reshape(batch, heads, -1, QUERY_BLOCK, size)
    block_by_block = jax.checkpoint(
        lambda q_BHQK: _attend(q_BHQK, k_BHSK, v_BHSK, lengths_B=lengths_B)
    )
    mixed = jax.lax.map(block_by_block, jnp.moveaxis(blocks, 2, 0))
    return jnp.moveaxis(mixed, 0, 2).reshape(q_BHQK.shape)


def _by_cudnn(q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, lengths_B: Array | None = None) -> Array:
    """cuDNN's flash attention."""

    def attend(*given: Array) -> Array:
        q_BQHK, k_BSHK, v_BSHK = (x.swapaxes(1, 2) for x in given[:3])
        options: dict[str, Any] = {"scale": 1.0, "implementation": "cudnn"}
        if given[3:]:
            options |= {"key_value_seq_lengths": given[3]}
            options |= {"query_seq_lengths": jnp.full_like(given[3], q_BQHK.shape[1])}
        return jax.nn.dot_product_attention(q_BQHK, k_BSHK, v_BSHK, **options).swapaxes(1, 2)

    return on_each_device(
        attend, q_BHQK, k_BHSK, v_BHSK, *(() if lengths_B is None else (lengths_B,))
    )


# Of unmasked attention of many queries; `splash` comes here in float32 only.
IN_PARTS: dict[Backend, Callable[[Array, Array, Array, Array | None], Array]] = {
    "xla": _by_query_block,
    "cpu": _by_head,
    "cudnn": _by_cudnn,
    "splash": _by_query_block,
}


def _by_splash(
    q_BHQK: Array, k_BHSK: Array, v_BHSK: Array, kv_length: int | Array | None = None
) -> Array:
    """Splash attention, whose scores stay on the chip.

    Keys of a clip behind its own length are of another segment than all queries.
    """
    whole = kv_length if isinstance(kv_length, int) else None
    lengths = () if kv_length is None or isinstance(kv_length, int) else (kv_length,)

    def attend(*given: Array) -> Array:
        queries, keys = given[0].shape[2], given[1].shape[2]
        blocks: list[Any] = [
            jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _block(x.shape[2])), (0, 0)))
            for x in given[:3]
        ]
        kernel = _splash(given[0].shape[1], queries, keys, whole or keys)
        if given[3:]:
            padded_q, padded_kv = blocks[0].shape[2], blocks[1].shape[2]
            behind_BS = jnp.arange(padded_kv) >= given[3][:, None]
            own_BQ = jnp.zeros((len(behind_BS), padded_q), jnp.int32)
            blocks.append(splash.SegmentIds(own_BQ, behind_BS.astype(jnp.int32)))
        return jax.vmap(kernel)(*blocks)[:, :, :queries]

    return on_each_device(attend, q_BHQK, k_BHSK, v_BHSK, *lengths)


@cache
def _splash(heads: int, queries: int, keys: int, kv_length: int, interpret: bool = False) -> Any:
    """The kernel for one clip, without keys from `kv_length` on. interpret: run on any device."""
    block, kv_block = _block(queries), _block(keys)
    padded = (queries + -queries % block, keys + -keys % kv_block)
    mask_QS = np.broadcast_to(np.arange(padded[1]) < kv_length, padded)
    sizes: dict[str, Any] = {f"block_{name}": block for name in ("q", "q_dkv", "q_dq")}
    names = ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")
    sizes |= {f"block_{name}": kv_block for name in names}
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([splash_attention_mask.NumpyMask(mask_QS)] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _block(length: int) -> int:
    """Positions at a time, of a text or of the audio: whole lanes."""
    return min(KERNEL_BLOCK, length + -length % LANES)
