"""Losses on held-out clips, by hand from the logits."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.config import LossConfig
from flax_distil.data.loader import LoaderState
from flax_distil.distill.setup import TrainProgram
from flax_distil.distill.step import features
from flax_distil.distill.validation import HeldOut, score
from flax_distil.parallel.mesh import make_mesh


@pytest.fixture
def held_out(make_batch) -> HeldOut:
    """Ten clips in batches of 8: six rows of the second one fill it up."""

    def batches(_):
        for seed in range(9):
            yield make_batch(8, seed=seed), LoaderState()

    loader: object = SimpleNamespace(utterances=[], batches=batches)
    return HeldOut(loader, 10)  # type: ignore[arg-type]


def test_each_clip_counts_once_at_temperature_1(train_spec, parameters, make_batch, held_out):
    params, frozen = parameters
    train_spec = replace(
        train_spec, loss=LossConfig(temperature=2.0, label_smoothing=0.1), data_shards=2
    )
    program = TrainProgram(train_spec, make_mesh(2, 1, 1, jax.devices()[:2]), frozen, None)
    found = score({"clean": held_out}, params, program)

    sums = np.zeros(3)
    for seed, rows in ((0, 8), (1, 2)):
        batch = jax.tree.map(lambda x, rows=rows: x[:rows], make_batch(8, seed=seed))
        audio = train_spec.teacher.encoder(frozen.teacher["encoder"])(features(batch, train_spec))
        logs = []
        for spec, half in ((train_spec.teacher, frozen.teacher), (train_spec.student, params)):
            decoder = spec.decoder(half["decoder"])
            logits = decoder.logits(decoder(jnp.asarray(batch.tokens), audio))
            logs.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
        theirs, ours = logs
        kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
        ce = -np.take_along_axis(ours, batch.targets[..., None], -1)[..., 0]
        weights = batch.weights
        sums += [(kl * weights).sum(), (ce * weights).sum(), weights.sum()]
    expected = {"clean/kl": sums[0] / sums[2], "clean/ce": sums[1] / sums[2]}
    assert found == pytest.approx(expected, rel=1e-4)


def test_without_the_teachers_decoder_there_is_no_kl(train_spec, parameters, held_out):
    params, frozen = parameters
    train_spec = replace(train_spec, loss=LossConfig(kl=0.0))
    frozen = frozen._replace(teacher={"encoder": frozen.teacher["encoder"]})
    program = TrainProgram(train_spec, make_mesh(1, 1, 1, jax.devices()[:1]), frozen, None)
    found = score({"clean": held_out}, params, program)
    assert list(found) == ["clean/ce"]
