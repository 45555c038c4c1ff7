"""The same step on one device and on eight, however the eight are arranged."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.config import ComputeConfig, DistillConfig
from flax_distil.distill.setup import prepare
from flax_distil.distill.step import initial_state
from flax_distil.parallel.mesh import batch_sharding


@pytest.fixture(scope="module")
def one_device(step, train_spec, parameters, make_batch):
    state = initial_state(parameters[0], train_spec.optimizer)
    return step(state, parameters[1], make_batch())


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_are_one(
    sizes, one_device, train_spec, teacher, student, make_batch, tmp_path
):
    """Sums are taken in another order: 1e-6."""
    data, fsdp, tensor = sizes
    config = DistillConfig(
        "teacher",
        "student",
        (),
        tmp_path,
        batch_size=8,
        loss=train_spec.loss,
        optimizer=train_spec.optimizer,
        compute=ComputeConfig("float32", data=data, fsdp=fsdp, tensor=tensor, fsdp_min_elements=64),
    )
    program, state = prepare(config, teacher, student)
    place = batch_sharding(program.mesh)
    batch = jax.tree.map(lambda x: jax.device_put(x, place), make_batch())
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    before = state
    after, metrics = program.step(state, program.frozen, batch)
    expected, expected_metrics = one_device
    for name in ("loss", "kl", "ce", "mse", "gradient_norm", "tokens"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-6, err_msg=name)
    moments = lambda state: jax.tree.leaves(state.optimizer[1].mu)
    for ours, theirs in zip(moments(after), moments(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == placed
    kernel = after.params["decoder"]["layers"][0]["feed_forward"]["up"]["kernel"]
    shard = kernel.addressable_shards[0].data.size
    assert shard * fsdp * tensor == kernel.size
    assert jax.tree.leaves(before.params)[0].is_deleted()  # donated
    assert jnp.isfinite(metrics["loss"])


def test_parameters_are_cut_like_their_moments(train_spec, teacher, student, tmp_path):
    compute = ComputeConfig("float32", fsdp=4, fsdp_min_elements=64)
    config = DistillConfig("t", "s", tmp_path, batch_size=8, compute=compute)
    _, state = prepare(replace(config, optimizer=train_spec.optimizer), teacher, student)
    cut = lambda tree: [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    assert cut(state.params) == cut(state.optimizer[1].mu) == cut(state.optimizer[1].nu)
