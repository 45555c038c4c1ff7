"""Options that are off by default: schedules, frozen positions, a teacher that fades, epochs."""

import logging
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.config import DistillConfig, LossConfig, OptimizerConfig
from flax_distil.distill.check import check_numbers, log_length, with_defaults
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
    given = OptimizerConfig(steps=300, warmup_steps=0)
    for epochs, steps in ((1.0, 4), (2.0, 8), (0.1, 1), (8 / 30, 1)):
        asked = replace(config, optimizer=replace(given, epochs=epochs))
        assert with_defaults(asked, 30, 1, True).optimizer.steps == steps
    assert with_defaults(replace(config, optimizer=given), 30, 1, True).optimizer == given
    with pytest.raises(InputError, match=r"epochs is 0\.266667 and the number of clips is not kno"):
        with_defaults(asked, None, 1, True)


@pytest.mark.parametrize(
    ("on_cpu", "shards", "clips", "expected"),
    [
        (True, 1, 18, (4, 36, 3)),  # eight passes, a tenth of them warm-up
        (True, 8, 10**6, (8, 80_000, 500)),  # a batch divides over the shards
        (False, 4, 300, (4, 600, 60)),
        (False, 1, 1_300, (8, 1_300, 130)),
        (False, 4, 10_000, (64, 1_250, 125)),
        (False, 4, 10**7, (256, 80_000, 500)),  # the paper's
        (False, 6, None, (258, 80_000, 500)),  # a stream
    ],
)
def test_defaults_fit_the_data_and_the_machine(tmp_path, on_cpu, shards, clips, expected):
    config = DistillConfig("t", "s", tmp_path)
    check_numbers(config)
    found = with_defaults(config, clips, shards, on_cpu)
    optimizer = found.optimizer
    assert (found.batch_size, optimizer.steps, optimizer.warmup_steps) == expected
    assert with_defaults(found, clips, 1, True) == found


def test_more_epochs_than_published_ones_are_a_warning(config, caplog):
    for steps, warnings in ((80, 0), (81, 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "flax_distil"):
            log_length(replace(config, optimizer=OptimizerConfig(steps)), 8, 0.014)
        assert f"8 clips, 0.01 hours of audio; {steps} updates of 8 clips" in caplog.messages[0]
        assert len(caplog.messages) == 1 + warnings
    assert "has 81 epochs of 8 clips, and published students have 8 to 80" in caplog.messages[1]


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
