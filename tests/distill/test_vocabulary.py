"""The fused loss against the plain formula over whole logits: value, gradients, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.config import LossConfig
from flax_distil.distill.losses import TeacherStates, vocabulary_losses
from flax_distil.parallel.mesh import for_each_shard

B, L, D, V = 4, 6, 8, 50


@pytest.fixture(scope="module")
def arrays():
    """Hidden states and embeddings of student and teacher, targets, and weights with gaps."""
    random = np.random.default_rng(0)
    hidden, wanted = (random.normal(size=(B, L, D)) for _ in range(2))
    embedding, theirs = (0.7 * random.normal(size=(V, D)) for _ in range(2))
    targets = random.integers(0, V, (B, L))
    weights = (np.arange(L) >= 1) & (np.arange(L) < np.array([[6], [2], [1], [4]]))
    return hidden, embedding, wanted, theirs, targets, weights.astype(np.float64)


def plain(hidden, embedding, wanted, theirs, targets, weights, config, factors=(1, 1)):
    """The paper's formula, logits and all; factors of KL and cross-entropy."""
    logits = jnp.einsum("bld,vd->blv", hidden, embedding)
    log_p, log_q = (
        jax.nn.log_softmax(x / config.temperature)
        for x in (jnp.einsum("bld,vd->blv", wanted, theirs), logits)
    )
    kl = config.temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    label = smoothed(targets, config.label_smoothing)
    ce = -jnp.sum(label * jax.nn.log_softmax(logits), axis=-1)
    kl, ce = (jnp.sum(x * weights * factor) for x, factor in zip((kl, ce), factors, strict=True))
    return config.kl * kl + config.ce * ce, (kl, ce)


def smoothed(targets, smoothing):
    return (1 - smoothing) * jax.nn.one_hot(targets, V) + smoothing / V


def fused(
    hidden, embedding, wanted, theirs, targets, weights, config, chunk=0, shards=1, factors=None
):
    copies, teacher = for_each_shard(embedding, shards), TeacherStates(wanted, theirs)
    parts = vocabulary_losses(hidden, copies, teacher, targets, weights, config, chunk, factors)
    return parts.total, (parts.kl, parts.ce)


@pytest.mark.parametrize(
    ("config", "chunk", "shards"),
    [
        (LossConfig(), 0, 1),
        (LossConfig(), 5, 2),
        (LossConfig(kl=1.0, ce=0.8, temperature=1.0, label_smoothing=0.1), 1, 1),
        (LossConfig(kl=0.0, ce=1.0, label_smoothing=0.3), 24, 1),
        (LossConfig(kl=0.5, ce=0.0, temperature=3.5), 7, 4),
    ],
)
def test_fused_is_plain(arrays, config, chunk, shards):
    """In float64, so that 1e-12 hides no mistake; a part that weighs 0 is not computed."""
    with jax.enable_x64():
        both = [
            jax.value_and_grad(partial(function, config=config), argnums=(0, 1), has_aux=True)
            for function in (plain, partial(fused, chunk=chunk, shards=shards))
        ]
        (expected, parts), gradients = both[0](*map(jnp.asarray, arrays))
        (total, ours), own = both[1](*map(jnp.asarray, arrays))
        np.testing.assert_allclose(total, expected, rtol=1e-12)
        for part, theirs, weight in zip(ours, parts, (config.kl, config.ce), strict=True):
            np.testing.assert_allclose(part, theirs if weight else 0, rtol=1e-12)
        for mine, theirs in zip(own, gradients, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize(("chunk", "shards"), [(0, 1), (5, 2)])
def test_factors_of_each_token(arrays, chunk, shards):
    """Of its KL and its cross-entropy, 0 among them; in float64 as above."""
    factors = np.random.default_rng(1).uniform(0, 2, (B, L, 2))
    factors[0, :, 0] = factors[1, :, 1] = 0
    with jax.enable_x64():
        each = (
            partial(plain, factors=np.moveaxis(factors, -1, 0)),
            partial(fused, factors=jnp.asarray(factors), chunk=chunk, shards=shards),
        )
        expected, found = (
            jax.value_and_grad(partial(one, config=LossConfig()), argnums=(0, 1), has_aux=True)(
                *map(jnp.asarray, arrays)
            )
            for one in each
        )
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_float32_and_bfloat16(arrays):
    """1e-5 in float32; in bfloat16, whose products have 8 bits, a percent of the largest."""
    for dtype, tolerance in [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)]:
        narrow = [jnp.asarray(a, dtype) for a in arrays[:4]] + [
            jnp.asarray(arrays[4]),
            jnp.asarray(arrays[5], jnp.float32),
        ]
        exact = [a.astype(jnp.float32) if a.dtype == dtype else a for a in narrow]
        gradient = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        config = LossConfig()
        (expected, _), theirs = gradient(partial(plain, config=config))(*exact)
        (total, _), ours = gradient(partial(fused, config=config, chunk=5))(*narrow)
        np.testing.assert_allclose(total, expected, rtol=tolerance)
        assert [g.dtype for g in ours] == [dtype, dtype]
        for mine, other in zip(ours, theirs, strict=True):
            most = float(jnp.abs(other).max())
            np.testing.assert_allclose(
                mine.astype(jnp.float32) / most, other / most, atol=tolerance
            )


def test_backward_scales_with_what_comes_back(arrays):
    loss = lambda scale: lambda *a: scale * fused(*a, LossConfig(), chunk=5)[0]
    once, twice = (jax.grad(loss(scale))(*map(jnp.asarray, arrays)) for scale in (1.0, 2.0))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_tokens_without_weight_are_not_visited(arrays):
    """Their teacher is not a number, and nothing of it arrives: they were sorted to the end."""
    hidden, embedding, wanted, theirs, targets, weights = map(jnp.asarray, arrays)
    holes = jnp.where(weights[..., None] > 0, wanted, jnp.nan)
    used = int(weights.sum())
    clean = fused(hidden, embedding, wanted, theirs, targets, weights, LossConfig(), chunk=used)
    spoilt = fused(hidden, embedding, holes, theirs, targets, weights, LossConfig(), chunk=used)
    assert float(clean[0]) == float(spoilt[0])
    none = fused(hidden, embedding, holes, theirs, targets, 0 * weights, LossConfig(), chunk=4)
    assert float(none[0]) == 0


def test_a_teacher_who_agrees_with_the_student_costs_nothing(arrays):
    """Whatever the temperature."""
    hidden, embedding, _, _, targets, weights = (jnp.asarray(a, jnp.float32) for a in arrays)
    for temperature in (1.0, 2.0, 5.0):
        config = LossConfig(kl=1.0, ce=0.0, temperature=temperature)
        teacher = TeacherStates(hidden, embedding)
        loss = lambda h, t=teacher, c=config: (
            vocabulary_losses(h, embedding[None], t, targets.astype(int), weights, c).total
        )
        value, gradient = jax.value_and_grad(loss)(hidden)
        np.testing.assert_allclose(value, 0, atol=1e-4)
        np.testing.assert_allclose(gradient, 0, atol=1e-4)


def test_memory_is_that_of_a_chunk():
    """The compiler's own count, at Whisper's vocabulary: 8 times fewer logits, 4 times less room
    at least, and no more operations than without chunks."""
    vocabulary, count, width = 51_864, 256, 16
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    hidden, weights = shape((1, count, width)), shape((1, count))
    embedding = shape((vocabulary, width))
    targets = jax.ShapeDtypeStruct((1, count), jnp.int32)

    def compiled(chunk):
        loss = lambda *a: fused(*a, LossConfig(), chunk=chunk)[0]
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            hidden, embedding, hidden, embedding, targets, weights
        )
        return lowered.compile()

    whole, parts = compiled(0), compiled(count // 8)
    room = lambda program: program.memory_analysis().temp_size_in_bytes
    assert room(whole) > 2 * 4 * count * vocabulary
    assert 4 * room(parts) < room(whole)
    flops = lambda program: program.cost_analysis()["flops"]  # of a loop, one turn is counted
    assert 8 * flops(parts) == pytest.approx(flops(whole), rel=0.05)
