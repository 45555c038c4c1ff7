"""A student that is given less than 30 s of audio, while its teacher is given all of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_whisper import losses_of, random_batch

from flax_distil.audio.log_mel import log_mel
from flax_distil.config import DistillConfig
from flax_distil.distill.check import check_config
from flax_distil.distill.setup import split_parameters
from flax_distil.distill.step import student_losses, teach
from flax_distil.errors import InputError
from flax_distil.model.generation import context_positions


def test_contexts_are_positions_in_order():
    assert context_positions((10, 5, 30, 0.5)) == (25, 250, 500)
    assert context_positions(()) == ()
    for wrong in (0, 31, -1, float("nan"), "5"):
        with pytest.raises(InputError, match="audio context of"):
            context_positions([wrong])


@pytest.mark.parametrize("own_encoder", [False, True])
def test_the_student_is_given_its_part_and_the_teacher_everything(
    train_spec, teacher, student, own_encoder
):
    """Against the student alone over the states of the shortened clip."""
    spec = replace(train_spec, loss=replace(train_spec.loss, mse=0.0), own_encoder=own_encoder)
    split = split_parameters(spec, teacher.params, student.params)
    params, frozen = jax.tree.map(jnp.asarray, split)
    batch = random_batch(rows=2)
    found = losses_of(params, frozen, replace(batch, positions=np.array([16, 5], np.int32)), spec)
    guide, expected = teach(frozen, batch, spec), np.zeros(2)
    encoder = spec.teacher.encoder(frozen.teacher["encoder"])
    for row, positions in enumerate((16, 5)):
        one = replace(
            batch, **{k: v[row : row + 1] for k, v in vars(batch).items() if v is not None}
        )
        short = encoder(log_mel(one.waveforms, 80)[:, : 2 * positions])
        states = guide.teacher._replace(hidden=guide.teacher.hidden[row : row + 1])
        alone = replace(spec, own_encoder=False)
        losses = student_losses(
            params, frozen, guide._replace(audio=short, teacher=states), one, alone
        )[1]
        expected += losses.kl, losses.ce
    np.testing.assert_allclose([found.kl, found.ce], expected, rtol=1e-4)
    whole = losses_of(params, frozen, batch, spec)
    assert abs(whole.ce - found.ce) > 1e-3


def test_stored_states_are_the_students_alone(tmp_path):
    config = DistillConfig(
        "teacher", "student", tmp_path, audio_states=tmp_path, audio_context=(5.0,)
    )
    check_config(replace(config, stored_teacher=True))
    with pytest.raises(InputError, match="add stored_teacher, or leave out audio_states"):
        check_config(config)
    with pytest.raises(InputError, match=r"audio context of 40"):
        check_config(replace(config, audio_context=(40.0,)))
