"""Teacher and student read the same tokens and get the same audio, whatever was done to either."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from random_whisper import losses_of

from flax_distil.config import AugmentConfig, LossConfig, OptimizerConfig
from flax_distil.distill.step import Frozen, TrainSpec
from flax_distil.model.spec import Spec
from flax_distil.model.student import layer_map


def test_a_teacher_is_no_way_from_itself(quick_jit, make_batch, teacher):
    """Its KL is 0 with a prompt without weight and with SpecAugment, through two encoders; both
    change the cross-entropy."""
    layers = layer_map(teacher.dims.decoder_layers, teacher.dims.decoder_layers)
    spec = Spec(teacher.dims)
    options = AugmentConfig(time_masks=2, time_mask_share=0.5, frequency_masks=1)
    train_spec = TrainSpec(
        spec, spec, LossConfig(), OptimizerConfig(), layers, own_encoder=True, augment=options
    )
    frozen = Frozen(teacher.params, teacher.params["encoder"])
    losses = quick_jit(partial(losses_of, train_spec=train_spec))

    batch = make_batch()
    weights = batch.weights * (np.arange(8) >= 3)  # tokens 0 … 2 are the text before
    batch = replace(batch, weights=weights.astype(np.float32))
    other = batch.tokens.copy()
    other[:, 1] = (other[:, 1] + 1) % (teacher.dims.vocab - 1)
    keys = np.arange(16, dtype=np.uint32).reshape(8, 2)
    found = [
        losses({"decoder": teacher.params["decoder"]}, frozen, one)
        for one in (batch, replace(batch, tokens=other), replace(batch, keys=keys))
    ]
    assert [float(one.kl) for one in found] == pytest.approx([0, 0, 0], abs=1e-4)
    plain, prompted, masked = (float(one.ce) for one in found)
    assert abs(prompted - plain) > 1e-2
    assert abs(masked - plain) > 1e-2
