"""The objective of the paper (section 3, equations 3 to 6), as sums over weighted tokens.

Every function returns a sum; who calls divides by the number of label tokens of the whole batch, on
all devices and in all micro-batches. Weights are 0 on padding and prompt. Float32 throughout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_distil.config import LossConfig


class Losses(NamedTuple):
    """The parts of the objective, unweighted; a part that weighs 0 is 0 and costs nothing."""

    kl: Float[Array, ""]
    ce: Float[Array, ""]
    mse: Float[Array, ""]


def objective(losses: Losses, config: LossConfig) -> Float[Array, ""]:
    """The weighted sum that is minimised."""
    return config.kl * losses.kl + config.ce * losses.ce + config.mse * losses.mse


def kl_divergence(
    teacher_BLV: Float[Array, "B L V"],
    student_BLV: Float[Array, "B L V"],
    weights_BL: Float[Array | np.ndarray, "B L"],
    temperature: float,
) -> Float[Array, ""]:
    """KL(teacher ‖ student) · T² of the distributions softened by T, summed over tokens.

    The gradient of softened logits shrinks with T²: the factor keeps it comparable to the
    cross-entropy's at every temperature (Hinton et al. 2015).
    """
    teacher_BLV = jax.nn.log_softmax(wide(teacher_BLV) / temperature)
    student_BLV = jax.nn.log_softmax(wide(student_BLV) / temperature)
    kl_BL = jnp.sum(jnp.exp(teacher_BLV) * (teacher_BLV - student_BLV), axis=-1)
    return temperature**2 * jnp.sum(kl_BL * weights_BL)


def cross_entropy(
    student_BLV: Float[Array, "B L V"],
    targets_BL: Int[Array | np.ndarray, "B L"],
    weights_BL: Float[Array | np.ndarray, "B L"],
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Cross-entropy on the pseudo-labels; smoothing ε mixes them with the uniform distribution."""
    log_BLV = jax.nn.log_softmax(wide(student_BLV))
    ce_BL = -jnp.take_along_axis(log_BLV, targets_BL[..., None], axis=-1)[..., 0]
    if label_smoothing:
        ce_BL = (1 - label_smoothing) * ce_BL - label_smoothing * log_BLV.mean(axis=-1)
    return jnp.sum(ce_BL * weights_BL)


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


def in_chunks(
    losses: Callable[..., tuple[Array, ...]],
    rows: tuple[Array, ...],
    weights_BL: Float[Array, "B L"],
    chunk: int,
) -> tuple[Array, ...]:
    """`losses(*rows)`, which are sums over tokens, over `chunk` label positions at a time.

    What `losses` makes inside, such as logits, exists for one chunk only, in the backward pass as
    well, where it is made again. Positions are cut and rows are not, so that each row stays on its
    device. A chunk that is padding in every row is skipped. `chunk` 0 takes all at once.
    """
    length = weights_BL.shape[1]
    if not 0 < chunk < length:
        return losses(*rows)

    def cut(x_BL: Array) -> Array:
        x_BL = jnp.pad(x_BL, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BL.ndim - 2))
        return x_BL.reshape(len(x_BL), -1, chunk, *x_BL.shape[2:]).swapaxes(0, 1)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(losses, *rows))

    @jax.checkpoint
    def part(rows: tuple[Array, ...], weights: Array) -> tuple[Array, ...]:
        return jax.lax.cond(jnp.any(weights > 0), lambda: losses(*rows), lambda: nothing)

    def add(sums: tuple[Array, ...], one: tuple[tuple[Array, ...], Array]):
        return jax.tree.map(jnp.add, sums, part(*one)), None

    return jax.lax.scan(add, nothing, (jax.tree.map(cut, rows), cut(weights_BL)))[0]


def wide(x: Array) -> Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
