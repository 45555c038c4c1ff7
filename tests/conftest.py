"""What every test may use: a quiet CPU platform, real weights, real speech, a small model."""

import os
from pathlib import Path

# Before jax is imported anywhere: one platform, eight pretended devices, compiled programs kept.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/flax-distil/tests/xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest-xdist share the cores

import pytest

from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.dims import WhisperDims


@pytest.fixture(scope="session")
def tiny_en_folder() -> Path:
    """whisper-tiny.en as a Transformers folder; fetched once for all workers."""
    return fetch_weights("whisper-tiny.en")


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """whisper-base, multilingual, as a Transformers folder."""
    return fetch_weights("whisper-base")


@pytest.fixture(scope="session")
def tiny_dims() -> WhisperDims:
    """Sizes of a model that compiles in a moment; Whisper's multilingual vocabulary."""
    return WhisperDims(
        mels=80,
        vocab=51_865,
        width=32,
        encoder_layers=2,
        encoder_heads=4,
        decoder_layers=2,
        decoder_heads=4,
        encoder_ffn=64,
        decoder_ffn=64,
    )


@pytest.fixture(scope="session")
def random_folders(tiny_en_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A small English teacher of random numbers and its one-layer student, as folders."""
    import jax

    from flax_distil.model.checkpoint import Checkpoint, save_checkpoint
    from flax_distil.model.dims import dims_to_hf
    from flax_distil.model.generation import generation_config, token_ids
    from flax_distil.model.spec import Spec
    from flax_distil.model.student import init_student

    dims = WhisperDims(80, 51_864, 16, 1, 2, 2, 2, 64, 64)
    params = jax.device_get(Spec(dims).init(jax.random.key(0)))
    config = dims_to_hf(dims) | token_ids(dims)
    teacher = Checkpoint(dims, params, config, generation_config(dims), tiny_en_folder)
    folder = tmp_path_factory.mktemp("random")
    save_checkpoint(teacher, folder / "teacher")
    save_checkpoint(init_student(teacher, 1), folder / "student")
    return folder / "teacher", folder / "student"
