"""Whisper's encoder and decoder (Radford et al. 2022, figure 1), read top-down.

Letters, here and everywhere: B batch, T mel frames (3000), S audio positions (1500), L tokens,
D width, H heads, K head size, F feed-forward, V vocabulary, M mel bins, N layers.

Pure maths: no loading, generation, sharding or loss. Products run in `dtype`, as exactly as
`model.precision` says; softmax, layer norm and logits are float32. The key/value cache is an
argument and a result. `attention` names how attention is computed (`model.attention`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from flax_distil.model.attention import (
    AnyKeyValues,
    Attention,
    Backend,
    append,
    batch_axis,
    pad_to_block,
)
from flax_distil.model.dims import WhisperDims
from flax_distil.model.precision import precision, product


class Cache(NamedTuple):
    """The state of decoding.

    own: keys and values of the decoder's tokens, of static length: `AnyKeyValues` for each layer.
    cross: those of the encoder's output, computed once.
    length: tokens in `own` so far, a scalar, or [B] where rows advance at their own pace.
    """

    own: Any
    cross: Any
    length: Int[Array, "..."]

    def rows(self, select: Callable[..., Array]) -> Any:
        """`own` with other rows: `select(array, axis=that of the batch)` of each array."""
        first = self.own if isinstance(self.own, AnyKeyValues) else self.own[0]
        return jax.tree.map(partial(select, axis=batch_axis(first)), self.own)


class Encoder(nnx.Module):
    """Two convolutions (the second halves time), fixed sinusoids, N self-attention layers."""

    def __init__(
        self, dims: WhisperDims, dtype: Any, remat: bool, attention: Backend, rngs: nnx.Rngs
    ):
        conv = partial(
            nnx.Conv, kernel_size=3, padding=1, dtype=dtype, precision=precision(dtype), rngs=rngs
        )
        self.conv1 = conv(dims.mels, dims.width)
        self.conv2 = conv(dims.width, dims.width, strides=2)
        self.positions = nnx.Param(sinusoids(dims.audio_positions, dims.width))
        self.layers = nnx.List(
            Layer(dims, dtype, attention, rngs, cross=False) for _ in range(dims.encoder_layers)
        )
        self.norm = layer_norm(dims.width, dtype, rngs)
        self.remat = remat
        self.attention: Backend = attention

    def __call__(
        self, mel_BTM: Float[Array, "B T M"], lengths_B: Int[Array, " B"] | None = None
    ) -> Float[Array, "B S D"]:
        """Log-mel frames to audio states, T = 2 S.

        lengths_B: positions of each clip: states behind them mean nothing and change no other.
        """
        if lengths_B is not None:
            inside_BT1 = jnp.arange(mel_BTM.shape[1])[None, :, None] < 2 * lengths_B[:, None, None]
            mel_BTM = jnp.where(inside_BT1, mel_BTM, 0)
        x_BSD = gelu(self.conv2(gelu(self.conv1(mel_BTM))))
        length = x_BSD.shape[1]
        x_BSD = x_BSD + self.positions[...].astype(x_BSD.dtype)[None, :length]
        kv_length = length if lengths_B is None else lengths_B
        x_BSD = pad_to_block(x_BSD, length, self.attention)
        forward = lambda layer, x_BSD, _: (layer(x_BSD, kv_length=kv_length), None)
        x_BSD, _ = apply_layers(self.layers, forward, x_BSD, self.remat)
        return self.norm(x_BSD[:, :length])


class Decoder(nnx.Module):
    """Token and learned position embeddings, N layers of self- and cross-attention, tied logits."""

    def __init__(
        self, dims: WhisperDims, dtype: Any, remat: bool, attention: Backend, rngs: nnx.Rngs
    ):
        self.tokens = nnx.Embed(dims.vocab, dims.width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(dims.text_positions, dims.width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            Layer(dims, dtype, attention, rngs, cross=True) for _ in range(dims.decoder_layers)
        )
        self.norm = layer_norm(dims.width, dtype, rngs)
        self.remat = remat
        self.attention: Backend = attention

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
        lengths_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """The final hidden states and those after every layer (a tuple, or stacked when scanned).

        embedded_BLD: the tokens' embeddings, where the caller has looked them up. dropout: in
        training, for unrolled layers alone. lengths_B: audio positions of each clip.
        """
        length = tokens_BL.shape[1]
        x_BLD = self.tokens(tokens_BL) if embedded_BLD is None else embedded_BLD
        x_BLD = x_BLD + self.positions(jnp.arange(length)[None])
        mask_LL = jnp.tril(jnp.ones((length, length), bool))
        kv_length = audio_BSD.shape[1] if lengths_B is None else lengths_B
        padded_BSD = pad_to_block(audio_BSD, length, self.attention)
        numbers = None
        if dropout is not None:
            x_BLD = dropout(x_BLD, 0)
            numbers = [1 + 3 * number for number in range(len(self.layers))]

        def forward(layer: Layer, x_BLD: Array, number: Any):
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
        """The final hidden states, and each layer's cross-attention before softmax, [B H L S]."""
        length = tokens_BL.shape[1]
        x_BLD = self.tokens(tokens_BL) + self.positions(jnp.arange(length)[None])
        mask_LL = jnp.tril(jnp.ones((length, length), bool))

        def forward(layer: Layer, x_BLD: Array, _: None):
            own = layer.self_attention.keys_values(layer.self_norm(x_BLD))
            cross = layer.cross_attention.keys_values(audio_BSD)
            query_BLD = x_BLD + layer.self_attention(layer.self_norm(x_BLD), own, mask_LL)
            scores_BHLS = layer.cross_attention.scores(layer.cross_norm(query_BLD), cross)
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
        """`logits` with the embedding transposed once: faster in a loop over few tokens.

        head_DV: the transposed embedding, where the caller has one.
        """
        own_VD = self.tokens.embedding[...].astype(self.tokens.dtype)
        kept_DV = jax.lax.optimization_barrier(own_VD.T) if head_DV is None else head_DV
        return lambda hidden_BLD: product("bld,dv->blv", hidden_BLD, kept_DV)

    def start(self, audio_BSD: Float[Array, "B S D"], length: int) -> Cache:
        """An empty cache for `length` tokens over these audio states."""

        def project(layer: Layer, nothing: Array, _: None):
            cross = layer.cross_attention.cached_keys_values(audio_BSD)
            shape = (*cross.keys.shape[:-2], length, cross.keys.shape[-1])
            own = jax.tree.map(lambda array: jnp.zeros(shape, array.dtype), cross)
            return nothing, (own, cross)

        _, caches = apply_layers(self.layers, project, jnp.zeros(()))
        if isinstance(self.layers, nnx.List):
            caches = tuple(zip(*caches, strict=True))
        return Cache(*caches, length=jnp.zeros((), jnp.int32))

    def step(
        self, tokens_BL: Int[Array, "B L"], cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Hidden states of L more tokens, and the cache with them."""
        fresh = jnp.arange(tokens_BL.shape[1]).reshape(*[1] * cache.length.ndim, -1)
        position = cache.length[..., None] + fresh  # [L] or [B L]
        # A row near the end may be given more tokens than there are positions; they are dropped.
        valid = jnp.minimum(position, self.positions.num_embeddings - 1)
        embedded = self.positions(valid)  # [L D] or [B L D]
        x_BLD = self.tokens(tokens_BL) + (embedded if embedded.ndim == 3 else embedded[None])
        room = jax.tree.leaves(cache.own)[0].shape[-2]
        mask_QS = jax.lax.broadcasted_iota(jnp.int32, (*position.shape, room), position.ndim)
        mask_QS = mask_QS <= position[..., None]
        mask_QS = mask_QS if mask_QS.ndim == 2 else mask_QS[:, None]  # [B 1 L room]

        def forward(layer: Layer, x_BLD: Array, kv: tuple[AnyKeyValues, AnyKeyValues]):
            own, cross = kv
            new = layer.self_attention.cached_keys_values(layer.self_norm(x_BLD))
            own = append(own, new, cache.length)
            return layer(x_BLD, own, cross, mask_QS), own

        kv: Any = (cache.own, cache.cross)
        if isinstance(self.layers, nnx.List):
            kv = tuple(zip(*kv, strict=True))
        x_BLD, own = apply_layers(self.layers, forward, x_BLD, extras=kv)
        return self.norm(x_BLD), Cache(own, cache.cross, cache.length + tokens_BL.shape[1])


class Dropout(NamedTuple):
    """Zeros a share of what each part of a decoder layer adds, as Transformers' `dropout` does.

    keys_B2: key data of each row, so that the masks are the same in any micro-batch, on any mesh.
    """

    rate: float
    keys_B2: UInt32[Array, "B 2"]

    def __call__(self, x_BLD: Float[Array, "B L D"], place: Any) -> Float[Array, "B L D"]:
        """place: the number of this use within a model."""

        def one(key_2: Array) -> Array:
            key_2 = jax.random.fold_in(key_2, place)
            return jax.random.bernoulli(key_2, 1 - self.rate, x_BLD.shape[1:])

        return jnp.where(jax.vmap(one)(self.keys_B2), x_BLD / (1 - self.rate), 0)


class Layer(nnx.Module):
    """Self-attention, in the decoder cross-attention to the audio, and feed-forward.

    Each has a norm before it and a residual around it.
    """

    def __init__(
        self, dims: WhisperDims, dtype: Any, attention: Backend, rngs: nnx.Rngs, cross: bool
    ):
        heads = dims.decoder_heads if cross else dims.encoder_heads
        ffn = dims.decoder_ffn if cross else dims.encoder_ffn
        self.self_norm = layer_norm(dims.width, dtype, rngs)
        self.self_attention = Attention(dims.width, heads, dtype, attention, rngs)
        if cross:
            self.cross_norm = layer_norm(dims.width, dtype, rngs)
            self.cross_attention = Attention(dims.width, heads, dtype, attention, rngs)
        self.feed_norm = layer_norm(dims.width, dtype, rngs)
        self.feed_forward = FeedForward(dims.width, ffn, dtype, rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        own: AnyKeyValues | None = None,
        cross: AnyKeyValues | None = None,
        mask_QS: Bool[Array, "... L T"] | None = None,
        kv_length: int | Int[Array, " B"] | None = None,
        drop: Callable[[Array, int], Array] = lambda y_BLD, _: y_BLD,
    ) -> Float[Array, "B L D"]:
        """own: keys and values of `x` and the tokens before it; those of `x` alone if None.

        cross: those of the audio. kv_length: of the audio, without padding.
        """
        normed_BLD = self.self_norm(x_BLD)
        own = self.self_attention.keys_values(normed_BLD) if own is None else own
        x_BLD = x_BLD + drop(self.self_attention(normed_BLD, own, mask_QS, kv_length), 0)
        if cross is not None:
            y_BLD = self.cross_attention(self.cross_norm(x_BLD), cross, kv_length=kv_length)
            x_BLD = x_BLD + drop(y_BLD, 1)
        return x_BLD + drop(self.feed_forward(self.feed_norm(x_BLD)), 2)


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

    In bfloat16 it is Abramowitz and Stegun's formula 7.1.26, exact to a quarter of the rounding: on
    TPUs `erf` may take longer than the product before it (docs/LOG.md).
    """
    if x.dtype != jnp.bfloat16:
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
    angle = jnp.arange(length)[:, None] * rate[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


def apply_layers(
    layers: Any, apply: Callable, x: Array, remat: bool = False, extras: Any = None
) -> tuple[Array, Any]:
    """x after all layers, and their outs: `apply(layer, x, extra) -> (x, out)` of each in turn.

    A list of layers is unrolled (fast to decode); one layer whose arrays have a leading N is
    scanned (fast to compile). `extras` and the outs have one entry a layer in the same form.
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
