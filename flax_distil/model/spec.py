"""From sizes to parameters and back to a model: the static half of a Whisper."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from flax_distil.model.attention import Backend, attention_for
from flax_distil.model.dims import WhisperDims
from flax_distil.model.whisper import Decoder, Encoder

Params = dict[Any, Any]  # {"encoder": …, "decoder": {"layers": {0: …}, …}} of arrays
HALVES = ("encoder", "decoder")


@dataclass(frozen=True)
class Spec:
    """All that decides the program, and none of its numbers.

    dtype: what matrix products run in ("float32", "bfloat16"; "float64" for parity tests).
    scan_layers: of these halves ("encoder", "decoder") the layers are one stacked layer under
        `lax.scan`, which compiles faster; unrolled layers decode faster on CPU, and where they are
        trained take less memory. The parameters must have the same form (`unstack_layers`).
    remat: recompute each layer in the backward pass (gradient checkpointing, paper table 15).
    attention: the backend that computes attention. "xla" works on every device; `on` chooses the
        fastest one of a device.
    """

    dims: WhisperDims
    dtype: str = "float32"
    scan_layers: tuple[str, ...] = ()
    remat: bool = False
    attention: Backend = "xla"

    def on(self, device: Any) -> "Spec":
        """This spec with the fastest attention on a `jax.Device`, or one to compile for."""
        return replace(self, attention=attention_for(device, self.dtype))

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, float32 (float64 where `dtype` is).

        The program has one layer of each half, however many there are: it compiles in seconds.
        """
        params = {}
        for half, own_key in zip(HALVES, jax.random.split(key), strict=True):
            params[half] = whole = _init(self, half, own_key)
            if half not in self.scan_layers:
                stacked, copies = whole["layers"], range(self.layers(half))
                whole |= {"layers": {index: _layer(stacked, index) for index in copies}}
        return params

    def layers(self, half: str) -> int:
        """How many the encoder or decoder has."""
        return getattr(self.dims, f"{half}_layers")

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters, nothing allocated."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def encoder(self, params: Params) -> Encoder:
        """The encoder over `params["encoder"]`."""
        return nnx.merge(_structure(self, "encoder"), params)

    def decoder(self, params: Params) -> Decoder:
        """The decoder over `params["decoder"]`."""
        return nnx.merge(_structure(self, "decoder"), params)


def unstack_layers(half: Params) -> Params:
    """Encoder or decoder parameters with the N layers of a leading axis as layers 0 … N-1."""
    count = jax.tree.leaves(half["layers"])[0].shape[0]
    layers = {n: jax.tree.map(lambda leaf, n=n: leaf[n], half["layers"]) for n in range(count)}
    return half | {"layers": layers}


# Building a module costs more than copying one, so a half is always built with a single layer.


@cache
def _structure(spec: Spec, half: str) -> nnx.GraphDef:
    module: Any = nnx.eval_shape(lambda: _build(spec, half, nnx.Rngs(0)))
    (layer,) = module.layers
    copies = range(spec.layers(half))
    stacked = half in spec.scan_layers
    module.layers = layer if stacked else nnx.List(nnx.clone(layer) for _ in copies)
    return nnx.split(module)[0]


@jax.jit
def _layer(stacked: Params, index: int | Int[Array, ""]) -> Params:
    """One of stacked layers, by one program for all of them."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


@partial(jax.jit, static_argnums=(0, 1))
def _init(spec: Spec, half: str, key: PRNGKeyArray) -> Params:
    """One half's random parameters, its layers stacked."""

    def params(key: PRNGKeyArray) -> Params:
        tree = nnx.to_pure_dict(nnx.split(_build(spec, half, nnx.Rngs(key)))[1])
        wide = jnp.promote_types(spec.dtype, jnp.float32)
        return jax.tree.map(lambda leaf: leaf.astype(wide), tree)

    layers = jax.vmap(lambda key: params(key)["layers"][0])(
        jax.random.split(key, spec.layers(half))
    )
    return params(key) | {"layers": layers}


def _build(spec: Spec, half: str, rngs: nnx.Rngs) -> Encoder | Decoder:
    dims = replace(spec.dims, encoder_layers=1, decoder_layers=1)
    build = Encoder if half == "encoder" else Decoder
    return build(dims, jnp.dtype(spec.dtype), spec.remat, spec.attention, rngs)
