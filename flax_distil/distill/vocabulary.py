"""KL and cross-entropy from final hidden states: logits exist for a few tokens at a time.

Logits are the memory of distillation: [B, L, 51866] in float32, of the teacher, of the student and
of the gradient. Here they exist for a chunk of tokens, and the gradient of a chunk is taken while
its logits are there, already in the forward pass, and only scaled in the backward pass. So nothing
is computed twice: 8 N D V operations for N tokens, as without chunks, where recomputing the logits
in the backward pass needs 12. Tokens of weight 0 (prompts, padding) are moved behind the others,
where the loop does not come: they cost nothing.

Letters beside the model's: G shards of a batch, N tokens of a shard, C tokens of a chunk, K tokens
whose teacher probability is stored.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_distil.config import LossConfig
from flax_distil.model.precision import product


class Heard(NamedTuple):
    """A teacher in memory: its final hidden states, and the embedding that makes logits of them."""

    hidden: Float[Array, "B L D"]
    embedding: Float[Array, "V D"]


class Stored(NamedTuple):
    """A teacher on disk: the K likeliest next tokens of each place, and all others together."""

    tokens: Int[Array, "... K"]
    log_probabilities: Float[Array, "... K"]
    """At temperature 1."""
    tail: Float[Array, "..."]
    """log Σ p^(1/T) over all other tokens, at the temperature of the loss; -inf where K is V."""


class Rows(NamedTuple):
    """What the losses need of each token; leaves are [B, L, …], then [G, N, …]."""

    targets: Int[Array, "..."]
    weights: Float[Array, "..."]
    teacher: Any
    factors: Float[Array, "... 2"] | None = None
    """Of KL and cross-entropy; 1 and 1 where None."""


class Parts(NamedTuple):
    """Sums over weighted tokens. No gradient flows through `kl` and `ce`, which are for the log."""

    total: Float[Array, ""]
    kl: Float[Array, ""]
    ce: Float[Array, ""]


def vocabulary_losses(
    hidden_BLD: Float[Array, "B L D"],
    embedding_GVD: Float[Array, "G V D"],
    teacher: Heard | Stored | None,
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    config: LossConfig,
    chunk: int = 0,
    factors_BL2: Float[Array, "B L 2"] | None = None,
) -> Parts:
    """`config.kl · KL(teacher ‖ student) · T² + config.ce · CE(targets)`, summed over tokens.

    embedding_GVD: the student's, for each of the G parts that the rows are cut into over devices
        (`parallel.mesh.for_each_shard`). All sums are a part's own until the loop is over, so that
        devices talk once and not in every turn.
    teacher: None where `config.kl` is 0.
    chunk: tokens of a shard whose logits exist at a time; 0 is all of them.
    factors_BL2: of KL and cross-entropy at each token; 1 and 1 where None.
    """
    shards = len(embedding_GVD)
    count = weights_BL.size // shards
    chunk = min(chunk, count) or count

    def spread(x_BL: Array) -> Array:
        x_GN = x_BL.reshape(shards, count, *x_BL.shape[2:])
        return jnp.pad(x_GN, [(0, 0), (0, -count % chunk)] + [(0, 0)] * (x_GN.ndim - 2))

    of_tokens, theirs = teacher, None
    if isinstance(teacher, Heard):
        of_tokens, theirs = teacher
    rows: Rows = jax.tree.map(spread, Rows(targets_BL, weights_BL, of_tokens, factors_BL2))
    hidden_GND = spread(hidden_BLD)
    parts: Any = _fused(hidden_GND, embedding_GVD, rows, theirs, config, chunk)
    return parts


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(hidden_GND, embedding_GVD, rows: Rows, theirs, config: LossConfig, chunk: int):
    return _sweep(hidden_GND, embedding_GVD, rows, theirs, config, chunk)[0]


def _forward(hidden_GND, embedding_GVD, rows: Rows, theirs, config: LossConfig, chunk: int):
    sums, gradients = _sweep(hidden_GND, embedding_GVD, rows, theirs, config, chunk)
    return sums, (gradients, jnp.zeros((), hidden_GND.dtype), jnp.zeros((), embedding_GVD.dtype))


def _backward(_config: LossConfig, _chunk: int, kept: Any, cotangents: Parts):
    gradients, *like = kept
    scaled = [(cotangents.total * g).astype(x.dtype) for g, x in zip(gradients, like, strict=True)]
    return (*scaled, None, None)


_fused.defvjp(_forward, _backward)


def _sweep(hidden_GND, embedding_GVD, rows: Rows, theirs, config: LossConfig, chunk: int):
    """The sums, and the gradients of the total, chunk by chunk of the tokens that count."""
    narrow, wide = hidden_GND.dtype, jnp.promote_types(hidden_GND.dtype, jnp.float32)
    ours, theirs = jax.tree.map(lambda x: x.astype(narrow), (embedding_GVD, theirs))
    order_GN = jnp.argsort(rows.weights == 0, axis=1, stable=True)
    used = jnp.max(jnp.sum(rows.weights != 0, axis=1))
    pick = jax.vmap(lambda x_N, places_C: x_N[places_C])

    def turn(number: Array, carry: tuple) -> tuple:
        sums_2G, hidden_gradient_GND, embedding_gradient_GVD = carry
        places_GC = jax.lax.dynamic_slice_in_dim(order_GN, number * chunk, chunk, axis=1)
        here, hidden_GCD = jax.tree.map(lambda x_GN: pick(x_GN, places_GC), (rows, hidden_GND))
        logits_GCV = product("gcd,gvd->gcv", hidden_GCD, ours)
        teacher = here.teacher
        if theirs is not None:
            teacher = product("gcd,vd->gcv", teacher, theirs)
        kl_GC, ce_GC, dlogits_GCV = token_losses(
            teacher, logits_GCV, here.targets, config, here.factors
        )
        sums_2G += jnp.stack([(part * here.weights).sum(axis=1) for part in (kl_GC, ce_GC)])
        dlogits_GCV = (here.weights[..., None] * dlogits_GCV).astype(narrow)
        dhidden_GCD = product("gcv,gvd->gcd", dlogits_GCV, ours)
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
        0, -(-used // chunk), turn, start
    )
    back_GN1 = jnp.argsort(order_GN, axis=1)[..., None]
    hidden_gradient_GND = jnp.take_along_axis(sorted_GND, back_GN1, axis=1)
    kl, ce = sums_2G.sum(axis=1)
    total = config.kl * kl + config.ce * ce
    return Parts(total, kl, ce), (hidden_gradient_GND, embedding_gradient_GVD)


def token_losses(
    teacher: Array | Stored,
    logits_V: Float[Array, "... V"],
    targets: Int[Array, "..."],
    config: LossConfig,
    factors_2: Float[Array, "... 2"] | None = None,
) -> tuple[Array, Array, Array]:
    """KL and cross-entropy of each token, and the gradient of their weighted sum by the logits.

    teacher: logits, or what is stored of them. A part that weighs 0 is 0 and costs nothing.
    factors_2: of each token's KL and cross-entropy, and so of their gradients.
    """
    kl = ce = jnp.zeros(targets.shape, logits_V.dtype)
    gradient_V = jnp.zeros((), logits_V.dtype)

    def scaled(both: tuple[Array, Array], part: int) -> tuple[Array, Array]:
        loss, gradient_V = both
        if factors_2 is None:
            return both
        return factors_2[..., part] * loss, factors_2[..., part, None] * gradient_V

    if config.kl:
        divergence: Any = stored_kl_divergence if isinstance(teacher, Stored) else kl_divergence
        kl, dlogits_V = scaled(divergence(teacher, logits_V, config.temperature), 0)
        gradient_V += config.kl * dlogits_V
    if config.ce:
        ce, dlogits_V = scaled(cross_entropy(logits_V, targets, config.label_smoothing), 1)
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


def stored_kl_divergence(
    teacher: Stored, student_V: Float[Array, "... V"], temperature: float
) -> tuple[Float[Array, "..."], Float[Array, "... V"]]:
    """`kl_divergence` over K + 1 events: each stored token, and «any other».

    Never above the full divergence (data processing inequality), and equal to it where the student
    divides its tail as the teacher does. Its gradient is that of a teacher who does.
    """
    ours, tokens = Softmax.of(student_V / temperature), teacher.tokens.astype(jnp.int32)
    log_p_K, tail = teacher.log_probabilities.astype(student_V.dtype) / temperature, teacher.tail
    log_mass = jnp.logaddexp(jax.nn.logsumexp(log_p_K, axis=-1), tail)
    log_p_K, log_r = log_p_K - log_mass[..., None], tail - log_mass
    p_K, r = jnp.exp(log_p_K), jnp.exp(log_r)

    log_q_K = jnp.take_along_axis(ours.logits, tokens, axis=-1) - jnp.log(ours.mass)
    rest_V = jnp.put_along_axis(ours.powers, tokens, 0, axis=-1, inplace=False)
    rest = jnp.maximum(rest_V.sum(axis=-1), jnp.finfo(rest_V.dtype).tiny)
    of_tail = r * (log_r - jnp.log(rest) + jnp.log(ours.mass[..., 0]))
    kl = jnp.sum(p_K * (log_p_K - log_q_K), axis=-1) + jnp.where(r > 0, of_tail, 0)
    gradient_V = jnp.put_along_axis(
        rest_V * (1 / ours.mass - (r / rest)[..., None]),
        tokens,
        jnp.exp(log_q_K) - p_K,
        axis=-1,
        inplace=False,
    )
    return temperature**2 * kl, temperature * gradient_V


def cross_entropy(
    student_V: Float[Array, "... V"], targets: Int[Array, "..."], smoothing: float = 0.0
) -> tuple[Float[Array, "..."], Float[Array, "... V"]]:
    """Cross-entropy of each token on its pseudo-label, and its gradient by the logits.

    Smoothing ε mixes the label with the uniform distribution.
    """
    vocabulary, ours = student_V.shape[-1], Softmax.of(student_V)
    # A comparison instead of a look-up: it needs no other device's piece of the vocabulary.
    label_V = (jnp.arange(vocabulary) == targets[..., None]).astype(student_V.dtype)
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
