"""Whisper's encoder and decoder (Radford et al. 2022, figure 1), read top-down.

Letters, here and everywhere: B batch, T mel frames (3000), S audio positions (1500), L tokens,
D width, H heads, K head size, F feed-forward, V vocabulary, M mel bins, N layers.

Pure maths: no loading, generation, sharding or loss. Compute runs in `dtype`, as exactly as that
says (`model.precision`); softmax, layer norm and logits in float32. The key/value cache goes in and
comes out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from flax_distil.model.attention import FEW_QUERIES, attend_side_by_side, attention, pad_to_block
from flax_distil.model.dims import WhisperDims
from flax_distil.model.precision import precision, product
from flax_distil.parallel.mesh import on_tpu


class KeyValues(NamedTuple):
    """Keys and values of one attention, [B H S K] each; a leading N when stacked."""

    keys: Array
    values: Array


class SideBySide(NamedTuple):
    """Keys and values as [B S D], all heads beside each other: they fill a TPU's tiles."""

    keys: Array
    values: Array


Seen = KeyValues | SideBySide


class Cache(NamedTuple):
    """All that decoding remembers.

    own: one `Seen` a layer over the decoder's tokens, of static length.
    cross: one `Seen` a layer over the encoder's output, computed once.
    length: tokens seen so far, a scalar, or [B] where rows advance on their own.
    """

    own: Any
    cross: Any
    length: Int[Array, "..."]

    def rows(self, choose: Callable[..., Array]) -> Any:
        """`own` with other rows: `choose(array, axis=that of the batch)`."""
        first = self.own if isinstance(self.own, KeyValues | SideBySide) else self.own[0]
        axis = first.keys.ndim - (4 if isinstance(first, KeyValues) else 3)
        return jax.tree.map(partial(choose, axis=axis), self.own)


class Encoder(nnx.Module):
    """Two convolutions (the second halves time), fixed sinusoids, N self-attention layers."""

    def __init__(self, dims: WhisperDims, dtype: Any, remat: bool, rngs: nnx.Rngs):
        conv = partial(
            nnx.Conv,
            kernel_size=(3,),
            padding=1,
            dtype=dtype,
            precision=precision(dtype),
            rngs=rngs,
        )
        self.conv1 = conv(dims.mels, dims.width)
        self.conv2 = conv(dims.width, dims.width, strides=2)
        self.positions = nnx.Param(sinusoids(dims.audio_positions, dims.width))
        self.layers = nnx.List(
            EncoderLayer(dims.width, dims.encoder_heads, dims.encoder_ffn, dtype, rngs)
            for _ in range(dims.encoder_layers)
        )
        self.norm = layer_norm(dims.width, dtype, rngs)
        self.remat = remat

    def __call__(self, mel_BTM: Float[Array, "B T M"]) -> Float[Array, "B S D"]:
        """Log-mel frames to audio states, T = 2 S."""
        x_BSD = gelu(self.conv2(gelu(self.conv1(mel_BTM))))
        x_BSD = x_BSD + self.positions[...].astype(x_BSD.dtype)
        kv_length = x_BSD.shape[1]
        x_BSD = pad_to_block(x_BSD, kv_length)
        forward = lambda layer, x_BSD, _: (layer(x_BSD, kv_length), None)
        x_BSD, _ = apply_layers(self.layers, forward, x_BSD, self.remat)
        return self.norm(x_BSD[:, :kv_length])


class Decoder(nnx.Module):
    """Token and learned position embeddings, N layers of self- and cross-attention, tied logits."""

    def __init__(self, dims: WhisperDims, dtype: Any, remat: bool, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(dims.vocab, dims.width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(dims.text_positions, dims.width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(dims.width, dims.decoder_heads, dims.decoder_ffn, dtype, rngs)
            for _ in range(dims.decoder_layers)
        )
        self.norm = layer_norm(dims.width, dtype, rngs)
        self.remat = remat

    def __call__(
        self, tokens_BL: Int[Array, "B L"], audio_BSD: Float[Array, "B S D"]
    ) -> Float[Array, "B L D"]:
        """Teacher-forced hidden states after the final layer norm."""
        return self.hidden_states(tokens_BL, audio_BSD)[0]

    def hidden_states(
        self,
        tokens_BL: Int[Array, "B L"],
        audio_BSD: Float[Array, "B S D"],
        embedded_BLD: Float[Array, "B L D"] | None = None,
        dropout: "Dropout | None" = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """The final hidden state and that after every layer (a tuple, or stacked when scanned).

        embedded_BLD: the tokens' embeddings, where the caller looked them up. dropout: of an
        unrolled decoder in training.
        """
        length = tokens_BL.shape[1]
        x_BLD = self.tokens(tokens_BL) if embedded_BLD is None else embedded_BLD
        x_BLD = x_BLD + self.positions(jnp.arange(length))
        mask_LL = jnp.tril(jnp.ones((length, length), bool))
        kv_length, padded_BSD = audio_BSD.shape[1], pad_to_block(audio_BSD, length)
        numbers = None
        if dropout is not None:
            x_BLD = dropout(x_BLD, 0)
            numbers = [1 + 3 * number for number in range(len(self.layers))]

        def forward(layer: DecoderLayer, x_BLD: Array, number: Any):
            own = layer.self_attention.keys_values(layer.self_norm(x_BLD))
            cross = layer.cross_attention.keys_values(padded_BSD)

            def drop(y_BLD: Array, place: int) -> Array:
                return y_BLD if dropout is None else dropout(y_BLD, number + place)

            x_BLD = layer(x_BLD, own, cross, mask_LL, kv_length, drop)
            return x_BLD, x_BLD

        x_BLD, every_BLD = apply_layers(self.layers, forward, x_BLD, self.remat, numbers)
        return self.norm(x_BLD), every_BLD

    def cross_scores(
        self, tokens_BL: Int[Array, "B L"], audio_BSD: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B L D"], Any]:
        """The final hidden state and what each layer's cross-attention softmaxes, [B H L S]."""
        length = tokens_BL.shape[1]
        x_BLD = self.tokens(tokens_BL) + self.positions(jnp.arange(length))
        mask_LL = jnp.tril(jnp.ones((length, length), bool))

        def forward(layer: DecoderLayer, x_BLD: Array, _: None):
            own = layer.self_attention.keys_values(layer.self_norm(x_BLD))
            cross = layer.cross_attention.keys_values(audio_BSD)
            asking_BLD = x_BLD + layer.self_attention(layer.self_norm(x_BLD), own, mask_LL)
            scores_BHLS = layer.cross_attention.scores(layer.cross_norm(asking_BLD), cross)
            return layer(x_BLD, own, cross, mask_LL), scores_BHLS

        x_BLD, scores = apply_layers(self.layers, forward, x_BLD)
        return self.norm(x_BLD), scores

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Scores over the vocabulary in float32, tied to the token embedding."""
        embedding_VD = self.tokens.embedding[...].astype(hidden_BLD.dtype)
        return product("bld,vd->blv", hidden_BLD, embedding_VD)

    def projection(
        self, head_DV: Float[Array, "D V"] | None = None
    ) -> Callable[[Float[Array, "B L D"]], Float[Array, "B L V"]]:
        """`logits` over the embedding transposed: faster in a loop of few tokens.

        head_DV: that copy, where the caller keeps one; else it is made.
        """
        own_VD = self.tokens.embedding[...].astype(self.tokens.dtype)
        kept_DV = jax.lax.optimization_barrier(own_VD.T) if head_DV is None else head_DV
        return lambda hidden_BLD: product("bld,dv->blv", hidden_BLD, kept_DV)

    def start(
        self, audio_BSD: Float[Array, "B S D"], length: int, side_by_side: bool = False
    ) -> Cache:
        """An empty cache for `length` tokens over these audio states.

        side_by_side: keep keys and values so, as decodes fastest on a TPU.
        """
        see = Attention.side_by_side if side_by_side else Attention.keys_values

        def project(layer: DecoderLayer, nothing: Array, _: None):
            cross = see(layer.cross_attention, audio_BSD)
            room = (*cross.keys.shape[:-2], length, cross.keys.shape[-1])
            own = jax.tree.map(lambda array: jnp.zeros(room, array.dtype), cross)
            return nothing, (own, cross)

        _, caches = apply_layers(self.layers, project, jnp.zeros(()))
        if isinstance(self.layers, nnx.List):
            caches = tuple(zip(*caches, strict=True))
        return Cache(*caches, length=jnp.zeros((), jnp.int32))

    def step(
        self, tokens_BL: Int[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Hidden states of L more tokens, and the cache that has seen them."""
        fresh = jnp.arange(tokens_BL.shape[1])
        position = cache.length[..., None] + fresh  # [L] or [B L]
        # A row near the end may be given more tokens than there are positions, to be dropped again.
        known = jnp.minimum(position, self.positions.num_embeddings - 1)
        x_BLD = self.tokens(tokens_BL) + self.positions(known)
        room = jax.tree.leaves(cache.own)[0].shape[-2]
        mask_QS = jnp.arange(room) <= position[..., None]
        mask_QS = mask_QS if mask_QS.ndim == 2 else mask_QS[:, None]  # [B 1 L room]

        def forward(layer: DecoderLayer, x_BLD: Array, remembered: tuple[Seen, Seen]):
            own, cross = remembered
            see = Attention.side_by_side if isinstance(own, SideBySide) else Attention.keys_values
            new = see(layer.self_attention, layer.self_norm(x_BLD))
            own = jax.tree.map(partial(append, at=cache.length), own, new)
            return layer(x_BLD, own, cross, mask_QS), own

        scanned = not isinstance(self.layers, nnx.List)
        remembered = (cache.own, cache.cross)
        if not scanned:
            remembered = tuple(zip(*remembered, strict=True))
        x_BLD, own = apply_layers(self.layers, forward, x_BLD, extras=remembered)
        return self.norm(x_BLD), Cache(own, cache.cross, cache.length + tokens_BL.shape[1])


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, width: int, heads: int, ffn: int, dtype: Any, rngs: nnx.Rngs):
        self.self_norm = layer_norm(width, dtype, rngs)
        self.self_attention = Attention(width, heads, dtype, rngs)
        self.feed_norm = layer_norm(width, dtype, rngs)
        self.feed_forward = FeedForward(width, ffn, dtype, rngs)

    def __call__(self, x_BSD: Float[Array, "B S D"], kv_length: int) -> Float[Array, "B S D"]:
        normed_BSD = self.self_norm(x_BSD)
        own = self.self_attention.keys_values(normed_BSD)
        x_BSD = x_BSD + self.self_attention(normed_BSD, own, kv_length=kv_length)
        return x_BSD + self.feed_forward(self.feed_norm(x_BSD))


class Dropout(NamedTuple):
    """Zeros a share of what each part of a decoder layer adds, as Transformers' `dropout` does.

    keys_B2: key data of each example, so that the masks are the same in any batch, on any mesh.
    """

    rate: float
    keys_B2: UInt32[Array, "B 2"]

    def __call__(self, x_BLD: Float[Array, "B L D"], place: Any) -> Float[Array, "B L D"]:
        """place: numbers the uses within a model."""

        def one(key_2: Array) -> Array:
            key_2 = jax.random.fold_in(key_2, place)
            return jax.random.bernoulli(key_2, 1 - self.rate, x_BLD.shape[1:])

        return jnp.where(jax.vmap(one)(self.keys_B2), x_BLD / (1 - self.rate), 0)


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention to the audio, feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int, dtype: Any, rngs: nnx.Rngs):
        self.self_norm = layer_norm(width, dtype, rngs)
        self.self_attention = Attention(width, heads, dtype, rngs)
        self.cross_norm = layer_norm(width, dtype, rngs)
        self.cross_attention = Attention(width, heads, dtype, rngs)
        self.feed_norm = layer_norm(width, dtype, rngs)
        self.feed_forward = FeedForward(width, ffn, dtype, rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        own: Seen,
        cross: Seen,
        mask_QS: Array,
        kv_length: int | None = None,
        drop: Callable[[Array, int], Array] = lambda y_BLD, _: y_BLD,
    ) -> Float[Array, "B L D"]:
        y_BLD = self.self_attention(self.self_norm(x_BLD), own, mask_QS)
        x_BLD = x_BLD + drop(y_BLD, 0)
        y_BLD = self.cross_attention(self.cross_norm(x_BLD), cross, kv_length=kv_length)
        x_BLD = x_BLD + drop(y_BLD, 1)
        return x_BLD + drop(self.feed_forward(self.feed_norm(x_BLD)), 2)


class Attention(nnx.Module):
    """Projections around `attention`; Whisper's keys have no bias."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        linear = partial(
            nnx.Linear, width, width, dtype=dtype, precision=precision(dtype), rngs=rngs
        )
        self.query = linear()
        self.key = linear(use_bias=False)
        self.value = linear()
        self.out = linear()
        self.heads = heads

    def keys_values(self, x_BSD: Float[Array, "B S D"]) -> KeyValues:
        """What others may look at, [B H S K] each."""
        return KeyValues(self.to_heads(self.key, x_BSD), self.to_heads(self.value, x_BSD))

    def side_by_side(self, x_BSD: Float[Array, "B S D"]) -> SideBySide:
        """The same, not split into heads."""
        return SideBySide(self.key(x_BSD), self.value(x_BSD))

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        seen: Seen,
        mask_QS: Array | None = None,
        kv_length: int | None = None,
    ) -> Float[Array, "B L D"]:
        """kv_length: as of `attention`."""
        scale = (x_BLD.shape[-1] // self.heads) ** -0.5
        if isinstance(seen, SideBySide):
            if x_BLD.shape[1] <= FEW_QUERIES:
                q_BLD, (keys, values) = self.query(x_BLD) * scale, seen
                return self.out(attend_side_by_side(q_BLD, keys, values, self.heads, mask_QS))
            seen = KeyValues(self.split(seen.keys), self.split(seen.values))
        q_BHLK = self.to_heads(self.query, x_BLD) * scale
        return self.from_heads(attention(q_BHLK, *seen, mask_QS, kv_length))

    def scores(self, x_BLD: Float[Array, "B L D"], seen: KeyValues) -> Float[Array, "B H L S"]:
        """Scaled products of queries and keys, before the softmax."""
        q_BHLK = self.to_heads(self.query, x_BLD)
        return q_BHLK.shape[-1] ** -0.5 * product("bhlk,bhsk->bhls", q_BHLK, seen.keys)

    def to_heads(self, linear: nnx.Linear, x_BLD: Float[Array, "B L D"]) -> Array:
        """What `linear` makes of x, [B H L K]: heads before time, the layout that decodes fastest.

        A TPU gets one product that writes it so; it would take as long again to turn the heads.
        """
        if not on_tpu():
            return self.split(linear(x_BLD))
        width, dtype = x_BLD.shape[-1], linear.dtype
        kernel_DHK = linear.kernel[...].astype(dtype).reshape(width, self.heads, -1)
        x_BLD, exact = x_BLD.astype(dtype), precision(dtype)
        y_BHLK = jnp.einsum("bld,dhk->bhlk", x_BLD, kernel_DHK, precision=exact)
        if linear.bias is None:
            return y_BHLK
        return y_BHLK + linear.bias[...].astype(dtype).reshape(self.heads, 1, -1)

    def from_heads(self, x_BHLK: Float[Array, "B H L K"]) -> Float[Array, "B L D"]:
        """What `out` makes of all heads' results."""
        batch, heads, length, size = x_BHLK.shape
        if not on_tpu():
            return self.out(x_BHLK.swapaxes(1, 2).reshape(batch, length, heads * size))
        dtype = self.out.dtype
        kernel_HKD = self.out.kernel[...].astype(dtype).reshape(heads, size, -1)
        x_BHLK, exact = x_BHLK.astype(dtype), precision(dtype)
        y_BLD = jnp.einsum("bhlk,hkd->bld", x_BHLK, kernel_HKD, precision=exact)
        bias_D = self.out.bias
        assert bias_D is not None
        return y_BLD + bias_D[...].astype(dtype)

    def split(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B H L K"]:
        """Channels to heads."""
        batch, length, width = x_BLD.shape
        return x_BLD.reshape(batch, length, self.heads, width // self.heads).swapaxes(1, 2)


class FeedForward(nnx.Module):
    """Two projections around an exact GELU."""

    def __init__(self, width: int, ffn: int, dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, precision=precision(dtype), rngs=rngs)
        self.up = linear(width, ffn)
        self.down = linear(ffn, width)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.down(gelu(self.up(x_BLD)))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Φ(x) with the exact Φ, in the convolution stem too.

    In bfloat16 on a TPU, where `erf` may take longer than the product before it (docs/LOG.md), it
    is Abramowitz and Stegun's formula 7.1.26, as near to the exact one as float32 has it.
    """
    if not (on_tpu() and x.dtype == jnp.bfloat16):
        return jax.nn.gelu(x, approximate=False)
    return gelu_by_exp(x.astype(jnp.float32)).astype(x.dtype)


def gelu_by_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU with erfc(z) = exp(-z²) times a polynomial of 1 / (1 + p z)."""
    z = jnp.abs(x) * 0.5**0.5
    t = 1 / (1 + 0.3275911 * z)
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)
    upper = 0.5 * jnp.polyval(jnp.array(terms, x.dtype), t, unroll=8) * jnp.exp(-z * z)
    return x * jnp.where(x < 0, upper, 1 - upper)


def layer_norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Statistics in float32 (two passes: the fast one-pass variance cancels), ε = 1e-5."""
    return nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, use_fast_variance=False, rngs=rngs)


def sinusoids(length: int, channels: int) -> Float[Array, "S D"]:
    """Encoder positions: sines, then cosines, of log-spaced periods from 2π to 10,000 · 2π."""
    rate = jnp.exp(-jnp.log(10_000.0) / (channels // 2 - 1) * jnp.arange(channels // 2))
    angle = jnp.arange(length)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def append(
    cache: Float[Array, "B ... S C"], new: Float[Array, "B ... L C"], at: Int[Array, "..."]
) -> Float[Array, "B ... S C"]:
    """Writes new keys or values behind the `at` known ones; `at` is a scalar or one a row."""
    new = new.astype(cache.dtype)
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)
    if at.ndim == 0:
        return write(cache, new, at)
    if cache.ndim == 4:
        return jax.vmap(write)(cache, new, at)
    # A TPU would write one row after the other, in a loop; all at once cost it less.
    for index in range(new.shape[1]):
        here_BS1 = (jnp.arange(cache.shape[1]) == at[:, None] + index)[..., None]
        cache = jnp.where(here_BS1, new[:, index, None], cache)
    return cache


def apply_layers(
    layers: Any, apply: Callable, x: Array, remat: bool = False, extras: Any = None
) -> tuple[Array, Any]:
    """Runs x through all layers: `apply(layer, x, extra) -> (x, out)`, collecting the outs.

    A list of layers is unrolled (fast to decode); one layer whose arrays have a leading N is
    scanned (fast to compile). `extras` has one entry a layer in the same form, as have the outs.
    With `remat` only the inputs of layers are kept for the backward pass.
    """
    maybe_remat = partial(jax.checkpoint, static_argnums=0) if remat else lambda f: f

    @maybe_remat
    def body(graphdef: nnx.GraphDef, x: Array, state: Any, extra: Any):
        return apply(nnx.merge(graphdef, state), x, extra)

    if not isinstance(layers, nnx.List):
        graphdef, state = nnx.split(layers)
        return jax.lax.scan(lambda x, item: body(graphdef, x, *item), x, (state, extras))
    outs = []
    for index, layer in enumerate(layers):
        graphdef, state = nnx.split(layer)
        x, out = body(graphdef, x, state, extras and extras[index])
        outs.append(out)
    return x, tuple(outs)
