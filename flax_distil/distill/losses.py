"""The objective of the paper (section 3, equations 3 to 6), as sums over weighted tokens.

Every function returns a sum; the caller divides by the number of label tokens of the whole batch,
on all devices and in all micro-batches. Weights are 0 on padding and prompt. Float32 throughout.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flax_distil.config import LossConfig


class Losses(NamedTuple):
    """The parts of the objective, unweighted; a part that weighs 0 is 0 and costs nothing."""

    kl: Float[Array, ""]
    ce: Float[Array, ""]
    mse: Float[Array, ""]


def objective(losses: Losses, config: LossConfig) -> Float[Array, ""]:
    """The weighted sum that is minimised."""
    return config.kl * losses.kl + config.ce * losses.ce + config.mse * losses.mse


def hidden_mse(
    teacher_NBLD: Any,
    student_NBLD: Any,
    weights_BL: Float[Array | np.ndarray, "B L"],
    layer_map: tuple[int, ...],
) -> Float[Array, ""]:
    """Squared distance of hidden states, a mean over width, summed over student layers and tokens.

    Student layer l, counted from 0, is held against teacher layer `layer_map[l]`, both as they
    leave their layer, before the final norm (paper's D.2).
    """
    total = jnp.zeros(())
    for layer, teacher_layer in enumerate(layer_map):
        distance_BLD = wide(student_NBLD[layer]) - wide(teacher_NBLD[teacher_layer])
        total += jnp.sum(jnp.mean(distance_BLD**2, axis=-1) * weights_BL)
    return total


def wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
