"""Multi-head attention, once for every device: scores and softmax in float32, no score tensor kept.

Letters: see `flax_distil.model.whisper`. Q and S are query and key positions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q_BHQK: Float[Array, "B H Q K"],
    k_BHSK: Float[Array, "B H S K"],
    v_BHSK: Float[Array, "B H S K"],
    mask_QS: Bool[Array, "... Q S"] | None = None,
) -> Float[Array, "B H Q K"]:
    """Softmax(q kᵀ) v; `q` comes scaled. True in `mask_QS` means «may look».

    The softmax is normalised after the value product: dividing [Q, K] instead of [Q, S] numbers
    saves a pass over the largest tensor of the model (1500 × 1500 a head in the encoder).
    """
    product = partial(
        jnp.einsum, preferred_element_type=jnp.promote_types(q_BHQK.dtype, jnp.float32)
    )
    scores = product("bhqk,bhsk->bhqs", q_BHQK, k_BHSK)
    if mask_QS is not None:
        scores = jnp.where(mask_QS, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = product("bhqs,bhsk->bhqk", weights.astype(v_BHSK.dtype), v_BHSK)
    return (mixed / total).astype(q_BHQK.dtype)
