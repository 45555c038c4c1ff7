"""From sizes to parameters and back to a model: the static half of a Whisper."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from flax_distil.model.dims import WhisperDims
from flax_distil.model.whisper import Decoder, Encoder

Params = dict[Any, Any]  # {"encoder": …, "decoder": {"layers": {0: …}, …}} of arrays


@dataclass(frozen=True)
class Spec:
    """All that decides the program, and none of its numbers.

    dtype: what matrix products run in ("float32", "bfloat16"; "float64" for parity tests).
    scan_layers: layers are one stacked layer under `lax.scan`, which compiles N times faster;
        unrolled layers decode faster on CPU. The parameters must have the same form
        (`stack_layers`, `unstack_layers`).
    remat: recompute each layer in the backward pass (gradient checkpointing, paper table 15).
    """

    dims: WhisperDims
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, float32 (float64 where `dtype` is)."""
        return _init(self, key)

    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters, nothing allocated."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def encoder(self, params: Params) -> Encoder:
        """The encoder over `params["encoder"]`."""
        return nnx.merge(_structure(self, Encoder), params)

    def decoder(self, params: Params) -> Decoder:
        """The decoder over `params["decoder"]`."""
        return nnx.merge(_structure(self, Decoder), params)


def stack_layers(half: Params) -> Params:
    """Encoder or decoder parameters with layers 0 … N-1 as one layer of leading axis N."""
    layers = [half["layers"][index] for index in range(len(half["layers"]))]
    return half | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(half: Params) -> Params:
    """The inverse of `stack_layers`."""
    count = jax.tree.leaves(half["layers"])[0].shape[0]
    layers = {n: jax.tree.map(lambda leaf, n=n: leaf[n], half["layers"]) for n in range(count)}
    return half | {"layers": layers}


@cache
def _structure(spec: Spec, half: type[Encoder] | type[Decoder]) -> nnx.GraphDef:
    module = nnx.eval_shape(lambda: half(spec.dims, jnp.dtype(spec.dtype), spec.remat, nnx.Rngs(0)))
    if spec.scan_layers:
        module.layers = module.layers[0]  # pyright: ignore[reportAttributeAccessIssue]
    return nnx.split(module)[0]


@partial(jax.jit, static_argnums=0)
def _init(spec: Spec, key: PRNGKeyArray) -> Params:
    def half(kind: type[Encoder] | type[Decoder], key: PRNGKeyArray) -> Params:
        module = kind(spec.dims, jnp.dtype(spec.dtype), spec.remat, nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.split(module)[1])
        wide = jnp.promote_types(spec.dtype, jnp.float32)
        params = jax.tree.map(lambda leaf: leaf.astype(wide), params)
        return stack_layers(params) if spec.scan_layers else params

    encoder, decoder = jax.random.split(key)
    return {"encoder": half(Encoder, encoder), "decoder": half(Decoder, decoder)}
