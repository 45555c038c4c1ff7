from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_distil.config import LossConfig, OptimizerConfig
from flax_distil.data.batches import Batch
from flax_distil.distill.setup import split_parameters
from flax_distil.distill.step import Plan, train_step
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student, layer_map

DIMS = WhisperDims(
    mels=80,
    vocab=96,
    width=32,
    encoder_layers=2,
    encoder_heads=2,
    decoder_layers=3,
    decoder_heads=2,
    encoder_ffn=64,
    decoder_ffn=64,
    audio_positions=16,
    text_positions=12,
)


@pytest.fixture(scope="session")
def teacher() -> Checkpoint:
    return random_teacher()


def random_teacher() -> Checkpoint:
    """A random teacher whose layers are not near-identities, so that mistakes show."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        one = float(path[-1].key == "scale")
        return (one + 0.2 * random.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, Spec(DIMS).abstract())
    generation = {"alignment_heads": [[1, 0], [2, 1]]}
    return Checkpoint(DIMS, params, dims_to_hf(DIMS), generation, Path("nowhere"))


@pytest.fixture(scope="session")
def student(teacher) -> Checkpoint:
    return init_student(teacher, 2)


@pytest.fixture(scope="session")
def plan(teacher, student) -> Plan:
    return Plan(
        Spec(teacher.dims),
        Spec(student.dims),
        LossConfig(mse=0.1),
        OptimizerConfig(steps=20, warmup_steps=2, learning_rate=3e-3),
        layer_map(2, DIMS.decoder_layers),
    )


def random_batch(rows: int = 8, length: int = 8, seed: int = 0) -> Batch:
    """Noise and random tokens; rows have different lengths and a prompt that has no weight."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, DIMS.vocab - 1, (rows, length + 1)).astype(np.int32)
    lengths = random.integers(3, length + 1, rows)
    position = np.arange(length)
    weights = (position >= 1) & (position < lengths[:, None])
    samples = 2 * DIMS.audio_positions * 160
    waveforms = random.integers(-8000, 8000, (rows, samples)).astype(np.int16)
    seconds = np.full(rows, samples / 16_000, np.float32)
    return Batch(
        waveforms,
        tokens[:, :-1],
        tokens[:, 1:],
        weights.astype(np.float32),
        seconds,
        np.arange(rows, dtype=np.int32),
    )


@pytest.fixture(scope="session")
def make_batch():
    return random_batch


@pytest.fixture(scope="session")
def parameters(plan, teacher, student):
    """Trainable and frozen parameters."""
    return split_parameters(plan, teacher, student, train_encoder=False)


@pytest.fixture(autouse=True)
def _compile_quickly():
    """Programs compile twice as fast and run slower: compiling is what these tests wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that compiles so in fixtures as well, which no test has begun yet."""
    return partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def step(plan, quick_jit):
    """The plain step, compiled once for all tests; donation is the trainer's."""
    return quick_jit(partial(train_step, plan=plan))
