"""Losses against numbers worked out by hand and against PyTorch's own functions."""

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
    return teacher, student, random.integers(0, 7, (2, 5))


def test_by_hand():
    even, sure = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    # KL(0.5, 0.5 ‖ 0.8, 0.2) = 0.5 ln(0.5/0.8) + 0.5 ln(0.5/0.2)
    np.testing.assert_allclose(kl_divergence(even, sure, 1.0)[0], 0.2231436, atol=1e-6)
    # at T = 2 the student is (2, 1) / 3: 4 (0.5 ln(0.5/0.6667) + 0.5 ln(0.5/0.3333))
    np.testing.assert_allclose(kl_divergence(even, sure, 2.0)[0], 0.2355661, atol=1e-6)
    np.testing.assert_allclose(cross_entropy(sure, jnp.array(1))[0], 1.6094379, atol=1e-6)
    states = [jnp.zeros((1, 1, 2)), jnp.full((1, 1, 2), 3.0)]
    one = jnp.ones((1, 1))
    np.testing.assert_allclose(hidden_mse(states, [jnp.ones((1, 1, 2))], one, (1,)), 4.0)
    parts = Losses(jnp.array(1.0), jnp.array(2.0), jnp.array(3.0))
    assert float(objective(parts, LossConfig(mse=0.5))) == pytest.approx(0.8 + 2.0 + 1.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_torchs(logits, temperature):
    teacher, student, _ = logits
    values, gradient = kl_divergence(jnp.asarray(teacher), jnp.asarray(student), temperature)
    theirs = torch.tensor(student, requires_grad=True)
    expected = F.kl_div(
        F.log_softmax(theirs / temperature, -1),
        F.softmax(torch.tensor(teacher) / temperature, -1),
        reduction="none",
    )
    expected = temperature**2 * expected.sum(-1)
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(logits, smoothing):
    _, student, targets = logits
    values, gradient = cross_entropy(jnp.asarray(student), jnp.asarray(targets), smoothing)
    theirs = torch.tensor(student, requires_grad=True)
    expected = F.cross_entropy(
        theirs.swapaxes(1, 2), torch.tensor(targets), reduction="none", label_smoothing=smoothing
    )
    expected.sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)


def test_logits_far_from_zero_are_no_trouble():
    """Softmax does not see what is added to all logits; neither may the losses' rounding."""
    teacher, student = jnp.array([3.0, 1.0, -40.0]), jnp.array([1.0, 3.0, -90.0])
    near, _ = kl_divergence(teacher, student, 2.0)
    far, gradient = kl_divergence(teacher + 512, student - 1024, 2.0)
    np.testing.assert_allclose(far, near, rtol=1e-6)
    assert np.isfinite(gradient).all()
