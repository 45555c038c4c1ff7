from functools import partial

import jax
import pytest
from random_whisper import DIMS, random_batch, random_teacher

from flax_distil.config import LossConfig, OptimizerConfig
from flax_distil.distill.setup import split_parameters
from flax_distil.distill.step import TrainSpec, train_step
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student, layer_map


@pytest.fixture(scope="session")
def teacher() -> Checkpoint:
    return random_teacher()


@pytest.fixture(scope="session")
def student(teacher) -> Checkpoint:
    return init_student(teacher, 2)


@pytest.fixture(scope="session")
def train_spec(teacher, student) -> TrainSpec:
    return TrainSpec(
        Spec(teacher.dims),
        Spec(student.dims),
        LossConfig(mse=0.1),
        OptimizerConfig(steps=20, warmup_steps=2, learning_rate=3e-3),
        layer_map(2, DIMS.decoder_layers),
    )


@pytest.fixture(scope="session")
def make_batch():
    return random_batch


@pytest.fixture(scope="session")
def parameters(train_spec, teacher, student):
    """Trainable and frozen parameters."""
    return split_parameters(train_spec, teacher.params, student.params)


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
def step(train_spec, quick_jit):
    """The plain step, compiled once for all tests; donation is the trainer's."""
    return quick_jit(partial(train_step, spec=train_spec))
