"""The objective of the paper (section 3, equations 3 to 6), as sums over weighted tokens.

Every function returns a sum; the caller divides by the number of label tokens of the whole batch,
on all devices and in all micro-batches. Weights are 0 on padding and prompt.

KL divergence and cross-entropy are computed from final hidden states, without whole logits.
Logits are what distillation needs memory for: float32 [B, L, 51866] of the teacher, of the student
and of the gradient. Here they exist for one chunk of tokens at a time. A chunk's gradient is
computed in the forward pass, while its logits exist, and only scaled in the backward pass. So
nothing is computed twice: 8 N D V operations for N tokens, as without chunks; recomputing logits in
the backward pass takes 12. Tokens of weight 0 (prompts, padding) are sorted behind the others and
the loop stops before them: they cost nothing.

Letters beside the model's: G shards of a batch, N tokens of a shard, C tokens of a chunk.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_distil.config import LossConfig
from flax_distil.model.precision import product


class Losses(NamedTuple):
    """The parts of the objective, unweighted; a part that weighs 0 is 0 and costs nothing."""

    kl: Float[Array, ""]
    ce: Float[Array, ""]
    mse: Float[Array, ""]


def objective(losses: Losses, config: LossConfig) -> Float[Array, ""]:
    """The weighted sum that is minimised."""
    return config.kl * losses.kl + config.ce * losses.ce + config.mse * losses.mse


class TeacherStates(NamedTuple):
    """The teacher's final hidden states, and the embedding that turns them into logits."""

    hidden: Float[Array, "B L D"]
    embedding: Float[Array, "V D"]


class LossRows(NamedTuple):
    """What the losses need of each token; leaves are [B, L, …], then [G, N, …].

    teacher: its final hidden states; None without KL. factors: of each token's KL and
    cross-entropy; None where all are 1.
    """

    targets: Int[Array, "..."]
    weights: Float[Array, "..."]
    teacher: Float[Array, "... D"] | None
    factors: Float[Array, "... 2"] | None = None


class LossSums(NamedTuple):
    """Sums over weighted tokens. Only `total` has a gradient; `kl` and `ce` are for the log."""

    total: Float[Array, ""]
    kl: Float[Array, ""]
    ce: Float[Array, ""]


def hidden_mse(
    teacher_NBLD: Any,
    student_NBLD: Any,
    weights_BL: Float[Array, "B L"],
    layer_map: tuple[int, ...],
) -> Float[Array, ""]:
    """Squared distance of hidden states, a mean over width, summed over student layers and tokens.

    Student layer l, counted from 0, is held against teacher layer `layer_map[l]`, both as they
    leave their layer, before the final norm (paper's D.2). At least float32.
    """
    total = jnp.zeros(())
    for ours_BLD, teacher_layer in zip(student_NBLD, layer_map, strict=True):
        wide = jnp.promote_types(ours_BLD.dtype, jnp.float32)
        distance_BLD = ours_BLD.astype(wide) - teacher_NBLD[teacher_layer].astype(wide)
        total += jnp.sum(jnp.mean(distance_BLD**2, axis=-1) * weights_BL)
    return total


def vocabulary_losses(
    hidden_BLD: Float[Array, "B L D"],
    embedding_GVD: Float[Array, "G V D"],
    teacher: TeacherStates | None,
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    config: LossConfig,
    chunk: int = 0,
    factors_BL2: Float[Array, "B L 2"] | None = None,
) -> LossSums:
    """`config.kl · KL(teacher ‖ student) · T² + config.ce · CE(targets)`, summed over tokens.

    Args:
        hidden_BLD: the student's final hidden states.
        embedding_GVD: the student's embedding for each of the G shards of the batch
            (`parallel.mesh.for_each_shard`). Each shard has its own sums until the loop is over, so
            that devices communicate once and not in every iteration.
        teacher: None where `config.kl` is 0.
        targets_BL: token ids.
        weights_BL: of the tokens; 0 for prompts and padding.
        config: weights of the losses and the temperature T.
        chunk: tokens of a shard whose logits exist at a time; 0 is all of them.
        factors_BL2: of KL and cross-entropy at each token; None where all are 1.
    """
    shards = len(embedding_GVD)
    count = weights_BL.size // shards
    chunk = min(chunk, count) or count

    def by_shard(x_BL: Array) -> Array:
        x_GN = x_BL.reshape(shards, count, *x_BL.shape[2:])
        return jnp.pad(x_GN, [(0, 0), (0, -count % chunk)] + [(0, 0)] * (x_GN.ndim - 2))

    states, teacher_embedding = (None, None) if teacher is None else teacher
    rows: LossRows = jax.tree.map(by_shard, LossRows(targets_BL, weights_BL, states, factors_BL2))
    sums: Any = _fused(by_shard(hidden_BLD), embedding_GVD, rows, teacher_embedding, config, chunk)
    return sums


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(hidden_GND, embedding_GVD, rows: LossRows, teacher_VD, config: LossConfig, chunk: int):
    return _sweep(hidden_GND, embedding_GVD, rows, teacher_VD, config, chunk)[0]


def _forward(hidden_GND, embedding_GVD, rows: LossRows, teacher_VD, config: LossConfig, chunk: int):
    sums, gradients = _sweep(hidden_GND, embedding_GVD, rows, teacher_VD, config, chunk)
    return sums, (gradients, jnp.zeros((), hidden_GND.dtype), jnp.zeros((), embedding_GVD.dtype))


def _backward(_config: LossConfig, _chunk: int, kept: Any, cotangents: LossSums):
    gradients, *like = kept
    scaled = [(cotangents.total * g).astype(x.dtype) for g, x in zip(gradients, like, strict=True)]
    return (*scaled, None, None)


_fused.defvjp(_forward, _backward)


def _sweep(hidden_GND, embedding_GVD, rows: LossRows, teacher_VD, config: LossConfig, chunk: int):
    """The sums, and the gradients of the total, chunk by chunk of the tokens that count."""
    narrow, wide = hidden_GND.dtype, jnp.promote_types(hidden_GND.dtype, jnp.float32)
    ours_GVD, teacher_VD = jax.tree.map(lambda x: x.astype(narrow), (embedding_GVD, teacher_VD))
    order_GN = jnp.argsort(rows.weights == 0, axis=1, stable=True)
    used = jnp.max(jnp.sum(rows.weights != 0, axis=1))
    pick = jax.vmap(lambda x_N, places_C: x_N[places_C])

    def add_chunk(number: Array, carry: tuple) -> tuple:
        sums_2G, hidden_gradient_GND, embedding_gradient_GVD = carry
        places_GC = jax.lax.dynamic_slice_in_dim(order_GN, number * chunk, chunk, axis=1)
        here, hidden_GCD = jax.tree.map(lambda x_GN: pick(x_GN, places_GC), (rows, hidden_GND))
        logits_GCV = product("gcd,gvd->gcv", hidden_GCD, ours_GVD)
        teacher_GCV = None
        if teacher_VD is not None:
            teacher_GCV = product("gcd,vd->gcv", here.teacher, teacher_VD)
        kl_GC, ce_GC, dlogits_GCV = token_losses(
            teacher_GCV, logits_GCV, here.targets, config, here.factors
        )
        sums_2G += jnp.stack([(part * here.weights).sum(axis=1) for part in (kl_GC, ce_GC)])
        dlogits_GCV = (here.weights[..., None] * dlogits_GCV).astype(narrow)
        dhidden_GCD = product("gcv,gvd->gcd", dlogits_GCV, ours_GVD)
        hidden_gradient_GND = jax.lax.dynamic_update_slice_in_dim(
            hidden_gradient_GND, dhidden_GCD, number * chunk, axis=1
        )
        embedding_gradient_GVD += product("gcv,gcd->gvd", dlogits_GCV, hidden_GCD)
        return sums_2G, hidden_gradient_GND, embedding_gradient_GVD

    start = (
        jnp.zeros((2, len(hidden_GND)), wide),
        jnp.zeros(hidden_GND.shape, wide),
        jnp.zeros(embedding_GVD.shape, wide),
    )
    sums_2G, sorted_GND, embedding_gradient_GVD = jax.lax.fori_loop(
        0, -(-used // chunk), add_chunk, start
    )
    back_GN1 = jnp.argsort(order_GN, axis=1)[..., None]
    hidden_gradient_GND = jnp.take_along_axis(sorted_GND, back_GN1, axis=1)
    kl, ce = sums_2G.sum(axis=1)
    total = config.kl * kl + config.ce * ce
    return LossSums(total, kl, ce), (hidden_gradient_GND, embedding_gradient_GVD)


def token_losses(
    teacher_V: Float[Array, "... V"] | None,
    student_V: Float[Array, "... V"],
    targets: Int[Array, "..."],
    config: LossConfig,
    factors_2: Float[Array, "... 2"] | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """KL and cross-entropy of each token, and the gradient of their weighted sum by the logits.

    A loss of weight 0 is 0 and costs nothing. factors_2: of each token's KL and cross-entropy.
    """
    kl = ce = jnp.zeros(targets.shape, student_V.dtype)
    gradient_V = jnp.zeros((), student_V.dtype)

    def scaled(both: tuple[Array, Array], part: int) -> tuple[Array, Array]:
        loss, gradient_V = both
        if factors_2 is None:
            return both
        return factors_2[..., part] * loss, factors_2[..., part, None] * gradient_V

    if config.kl:
        assert teacher_V is not None
        kl, dlogits_V = scaled(kl_divergence(teacher_V, student_V, config.temperature), 0)
        gradient_V += config.kl * dlogits_V
    if config.ce:
        ce, dlogits_V = scaled(cross_entropy(student_V, targets, config.label_smoothing), 1)
        gradient_V += config.ce * dlogits_V
    return kl, ce, gradient_V


def kl_divergence(
    teacher_V: Float[Array, "... V"], student_V: Float[Array, "... V"], temperature: float
) -> tuple[Float[Array, "..."], Float[Array, "... V"]]:
    """KL(teacher ‖ student) · T² of each token, softened by T, and its gradient by the logits.

    The gradient of softened logits shrinks with T²: the factor keeps it comparable to the
    cross-entropy's at every temperature (Hinton et al. 2015).
    """
    theirs, ours = Softmax.of(teacher_V / temperature), Softmax.of(student_V / temperature)
    cross = jnp.sum(theirs.powers * (theirs.logits - ours.logits), axis=-1, keepdims=True)
    kl = (cross / theirs.mass - jnp.log(theirs.mass) + jnp.log(ours.mass))[..., 0]
    return temperature**2 * kl, temperature * (ours.probabilities() - theirs.probabilities())


def cross_entropy(
    student_V: Float[Array, "... V"], targets: Int[Array, "..."], smoothing: float = 0.0
) -> tuple[Float[Array, "..."], Float[Array, "... V"]]:
    """Cross-entropy of each token on its pseudo-label, and its gradient by the logits.

    Smoothing ε mixes the label with the uniform distribution.
    """
    vocabulary, ours = student_V.shape[-1], Softmax.of(student_V)
    # A comparison instead of a look-up: it needs no other device's piece of the vocabulary.
    ids_V = jax.lax.broadcasted_iota(targets.dtype, student_V.shape, targets.ndim)
    label_V = (ids_V == targets[..., None]).astype(student_V.dtype)
    if smoothing:
        label_V = (1 - smoothing) * label_V + smoothing / vocabulary
    ce = jnp.log(ours.mass[..., 0]) - jnp.sum(label_V * ours.logits, axis=-1)
    return ce, ours.probabilities() - label_V


class Softmax(NamedTuple):
    """A distribution before its division: on a CPU it takes two thirds of log-softmax's time."""

    logits: Float[Array, "... V"]
    """Shifted: the largest is 0."""
    powers: Float[Array, "... V"]
    mass: Float[Array, "... 1"]

    @classmethod
    def of(cls, logits_V: Float[Array, "... V"]) -> "Softmax":
        """The softmax of logits."""
        shifted_V = logits_V - logits_V.max(axis=-1, keepdims=True)
        powers_V = jnp.exp(shifted_V)
        return cls(shifted_V, powers_V, powers_V.sum(axis=-1, keepdims=True))

    def probabilities(self) -> Float[Array, "... V"]:
        return self.powers / self.mass
