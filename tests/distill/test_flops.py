"""Operation counts against XLA's own, and against figures worked out for large-v3."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from flax_distil.config import LossConfig, OptimizerConfig
from flax_distil.distill.flops import (
    cross_flops,
    decoder_flops,
    encoder_flops,
    measured_peak,
    step_flops,
    vocabulary_flops,
    vocabulary_tokens,
)
from flax_distil.distill.step import Frozen, TrainSpec, initial_state, train_step
from flax_distil.model.dims import PUBLISHED
from flax_distil.model.spec import Spec
from flax_distil.parallel.mesh import make_mesh


def test_large_v3():
    """Eight clips of 256 tokens: teacher encoder 18.1 TF, decoder 6.3, 2-layer student 2.0."""
    teacher = PUBLISHED["large-v3"]
    student = replace(teacher, decoder_layers=2)
    decoder = decoder_flops(teacher, 256) + cross_flops(teacher) + vocabulary_flops(teacher, 256)
    assert 8 * encoder_flops(teacher) == pytest.approx(18.1e12, rel=0.01)
    assert 8 * decoder == pytest.approx(6.3e12, rel=0.02)
    train_spec = TrainSpec(Spec(teacher), Spec(student), LossConfig(), OptimizerConfig())
    assert step_flops(train_spec, 8, 256) == pytest.approx(26.3e12, rel=0.02)
    alone = replace(train_spec, loss=LossConfig(kl=0.0))  # of the teacher nothing runs
    both = 3 * 8 * encoder_flops(teacher) + step_flops(alone, 8, 256, encode=False)
    assert step_flops(replace(alone, train_encoder=True), 8, 256) == pytest.approx(both, rel=0.01)


def test_the_compiler_counts_about_the_same(train_spec, parameters, make_batch, quick_jit):
    """At a width where matrix products dominate; softmax, norms and Adam make up the rest."""
    dims = replace(
        train_spec.teacher.dims, width=256, encoder_ffn=1024, decoder_ffn=1024, vocab=2048,
        audio_positions=64, text_positions=64,
    )  # fmt: skip
    student = replace(dims, decoder_layers=2)
    wide = replace(train_spec, teacher=Spec(dims), student=Spec(student), loss=LossConfig())
    frozen, params = Spec(dims).abstract(), {"decoder": Spec(student).abstract()["decoder"]}
    state = jax.eval_shape(partial(initial_state, config=wide.optimizer), params)
    batch = make_batch(8, 64)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    shapes = replace(shapes, waveforms=jax.ShapeDtypeStruct((8, 64 * 320), "int16"))
    step = quick_jit(partial(train_step, spec=wide))
    cost = step.lower(state, Frozen(frozen, {}), shapes).cost_analysis()
    assert step_flops(wide, 8, 64) == pytest.approx(cost["flops"], rel=0.1)


def test_tokens_of_weight_0_have_no_logits():
    """Rows of 1, 7, 2 and 4 learnt tokens of 8 over two shards, by hand."""
    counts, place = np.array([1, 7, 2, 4]), np.arange(8)
    weights = (place < counts[:, None]).astype(np.float32)
    tokens = partial(vocabulary_tokens, weights, accumulation=1)
    assert tokens(shards=1, chunk=4) == 16  # 14 in chunks of 4
    assert tokens(shards=1, chunk=14) == 14
    assert tokens(shards=2, chunk=4) == 2 * 8  # shards of 8 and 6: two turns for both
    assert tokens(shards=2, chunk=5) == 2 * 10
    assert tokens(shards=1, chunk=0) == 32  # without chunks, all
    # micro-batches of rows 0 and 2, and 1 and 3: 3 and 11 tokens
    assert vocabulary_tokens(weights, accumulation=2, shards=1, chunk=4) == 4 + 12
    assert vocabulary_tokens(0 * weights, accumulation=1, shards=2, chunk=4) == 0


def test_only_what_is_computed_counts(train_spec):
    teacher, student = train_spec.teacher.dims, train_spec.student.dims
    whole = step_flops(train_spec, 8, 12)
    part = step_flops(train_spec, 8, 12, logits=32)
    saved = vocabulary_flops(teacher, 96 - 32) + 3 * vocabulary_flops(student, 96 - 32)
    assert whole - part == saved


def test_peak_is_a_rate():
    assert measured_peak(make_mesh(), "float32", seconds=0.1) > 1e9
