"""Options that are off by default: schedules, frozen positions, a teacher that fades, epochs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.config import DistillConfig, LossConfig, OptimizerConfig
from flax_distil.distill.check import check_numbers, with_steps
from flax_distil.distill.step import decayed, initial_state, learning_rate, train_step
from flax_distil.errors import InputError
from flax_distil.model.whisper import Dropout
from flax_distil.parallel.mesh import batch_sharding, make_mesh


@pytest.fixture
def config(tmp_path) -> DistillConfig:
    return DistillConfig("t", "s", tmp_path, batch_size=8)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.25, 1, 0.5, 0]),
        ("constant_with_warmup", [0.25, 1, 1, 1]),
        ("constant", [1, 1, 1, 1]),
    ],
)
def test_schedules(schedule, rates):
    config = OptimizerConfig(12, schedule=schedule, learning_rate=2.0, warmup_steps=4)
    found = [float(learning_rate(jnp.array(step), config)) for step in (0, 4, 8, 12)]
    assert found == pytest.approx([2 * rate for rate in rates])


def test_frozen_positions_stay_and_count_in_no_norm(train_spec, parameters, make_batch, quick_jit):
    params, frozen = parameters
    held = replace(train_spec.optimizer, freeze_embed_positions=True, weight_decay=0.1)
    found = {}
    for optimizer in (replace(held, freeze_embed_positions=False), held):
        state = initial_state(params, optimizer)
        step = quick_jit(partial(train_step, spec=replace(train_spec, optimizer=optimizer)))
        found[optimizer.freeze_embed_positions] = step(state, frozen, make_batch())
    positions = [found[one][0].params["decoder"]["positions"]["embedding"] for one in (True, False)]
    np.testing.assert_array_equal(positions[0], params["decoder"]["positions"]["embedding"])
    assert not np.array_equal(positions[1], params["decoder"]["positions"]["embedding"])
    assert found[True][1]["loss"] == pytest.approx(float(found[False][1]["loss"]), rel=1e-6)
    assert found[True][1]["gradient_norm"] < found[False][1]["gradient_norm"]
    masks = decayed(params, held)["decoder"]
    assert (masks["positions"]["embedding"], masks["tokens"]["embedding"]) == (False, True)


def test_the_teachers_weight_goes_to_its_end(train_spec, parameters, make_batch, quick_jit):
    """At update 5 of 20 from 0.8 to 0: as a run whose weight is 0.6 all along, by the loss, its
    parts and the parameters after it; the MSE keeps its weight."""
    params, frozen = parameters
    loss = LossConfig(kl=0.8, kl_end=0.0, mse=0.1)
    after = []
    for one in (loss, replace(loss, kl=0.6, kl_end=None)):
        state = initial_state(params, train_spec.optimizer)._replace(step=jnp.array(5))
        step = quick_jit(partial(train_step, spec=replace(train_spec, loss=one)))
        after.append(step(state, frozen, make_batch()))
    (fading, shown), (fixed, expected) = after
    for name in ("loss", "kl", "ce", "mse", "gradient_norm"):
        assert float(shown[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    # Adam's first update is the gradient's sign: its moments tell the gradients apart.
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-7),
        *(state.optimizer for state in (fading, fixed)),
    )


def test_epochs_become_steps(config):
    for epochs, steps in ((1.0, 4), (2.0, 8), (0.1, 1), (8 / 30, 1)):
        asked = replace(config, optimizer=OptimizerConfig(epochs=epochs))
        assert with_steps(asked, [20, 10]).optimizer.steps == steps
    assert with_steps(config, [20, 10]) == config
    with pytest.raises(
        InputError, match=r"epochs is 0\.266667 and the length of a stream is not known: give steps"
    ):
        with_steps(asked, [20, 10, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": LossConfig(kl=0.0, kl_end=0.5)}, "kl goes from 0.0 to kl_end 0.5"),
        ({"loss": LossConfig(kl_end=-1.0)}, "kl goes from 0.8 to kl_end -1.0"),
        ({"optimizer": OptimizerConfig(epochs=0.0)}, "epochs 0 must be positive"),
        ({"dropout": 1.0}, "dropout 1 must be at least 0 and below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        check_numbers(replace(config, **change))


def test_dropout_is_the_same_in_any_cut_and_new_in_each_update(
    train_spec, parameters, make_batch, quick_jit
):
    """On one device, on four, and in two micro-batches computed again; a share of what layers add
    is gone."""
    params, frozen = parameters
    dropping = replace(train_spec, dropout=0.25)
    state, batch = initial_state(params, train_spec.optimizer), make_batch()
    four = make_mesh(4, 1, 1, jax.devices()[:4])
    recomputed = replace(train_spec.student, remat=True)
    cut = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(four)), batch)
    found = [
        quick_jit(partial(train_step, spec=one))(start, frozen, rows)[1]["loss"]
        for one, start, rows in (
            (dropping, state, batch),
            (replace(dropping, data_shards=4), state, cut),
            (replace(dropping, accumulation=2, student=recomputed), state, batch),
            (train_spec, state, batch),
            (dropping, state._replace(step=state.step + 1), batch),
            (replace(dropping, seed=1), state, batch),
        )
    ]
    one, on_four, in_two, without, later, other = map(float, found)
    assert [on_four, in_two] == pytest.approx([one, one], rel=1e-5)
    assert len({round(value, 4) for value in (one, without, later, other)}) == 4

    dropped = Dropout(0.25, jnp.arange(4, dtype=jnp.uint32).reshape(2, 2))(jnp.ones((2, 50, 40)), 3)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.03)  # 4 sigma of 4,000 draws
    assert not np.array_equal(dropped[0], dropped[1])
