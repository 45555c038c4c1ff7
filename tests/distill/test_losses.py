"""Losses against numbers worked out by hand and against PyTorch's own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flax_distil.config import LossConfig
from flax_distil.distill.losses import Losses, cross_entropy, hidden_mse, kl_divergence, objective


@pytest.fixture(scope="module")
def logits():
    random = np.random.default_rng(0)
    teacher, student = (3 * random.normal(size=(2, 5, 7)).astype(np.float32) for _ in range(2))
    targets = random.integers(0, 7, (2, 5))
    weights = (np.arange(5) < np.array([[5], [3]])).astype(np.float32)
    return teacher, student, targets, weights


def test_by_hand():
    even, sure = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.8, 0.2]]]))
    one = jnp.ones((1, 1))
    # KL(0.5, 0.5 ‖ 0.8, 0.2) = 0.5 ln(0.5/0.8) + 0.5 ln(0.5/0.2)
    np.testing.assert_allclose(kl_divergence(even, sure, one, 1.0), 0.2231436, atol=1e-6)
    # at T = 2 the student is (2, 1) / 3: 4 (0.5 ln(0.5/0.6667) + 0.5 ln(0.5/0.3333))
    np.testing.assert_allclose(kl_divergence(even, sure, one, 2.0), 0.2355661, atol=1e-6)
    np.testing.assert_allclose(cross_entropy(sure, jnp.array([[1]]), one), 1.6094379, atol=1e-6)
    states = [jnp.zeros((1, 1, 2)), jnp.full((1, 1, 2), 3.0)]
    np.testing.assert_allclose(hidden_mse(states, [jnp.ones((1, 1, 2))], one, (1,)), 4.0)
    parts = Losses(jnp.array(1.0), jnp.array(2.0), jnp.array(3.0))
    assert float(objective(parts, LossConfig(mse=0.5))) == pytest.approx(0.8 + 2.0 + 1.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_torchs(logits, temperature):
    teacher, student, _, weights = logits
    value, gradient = jax.value_and_grad(kl_divergence, argnums=1)(
        teacher, student, weights, temperature
    )
    theirs = torch.tensor(student, requires_grad=True)
    expected = F.kl_div(
        F.log_softmax(theirs / temperature, -1),
        F.softmax(torch.tensor(teacher) / temperature, -1),
        reduction="none",
    ).sum(-1)
    expected = temperature**2 * (expected * torch.tensor(weights)).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(logits, smoothing):
    _, student, targets, weights = logits
    value, gradient = jax.value_and_grad(cross_entropy)(student, targets, weights, smoothing)
    theirs = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(weights > 0, targets, -100))
    expected = F.cross_entropy(
        theirs.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


def test_no_weight_no_gradient(logits):
    teacher, student, targets, weights = logits
    gradient = jax.grad(
        lambda s: kl_divergence(teacher, s, weights, 2.0) + cross_entropy(s, targets, weights)
    )(student)
    assert np.all(np.asarray(gradient)[weights == 0] == 0)
    assert np.all(np.abs(gradient).sum(-1)[weights > 0] > 0)
