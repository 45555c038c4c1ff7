"""What every test may use: a quiet CPU platform, real weights, real speech, a small model."""

import os
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

# Types and shapes of every call into these packages are checked by beartype; in the whole package
# (config too) with FLAX_DISTIL_CHECK_TYPES=1.
if os.environ.get("FLAX_DISTIL_CHECK_TYPES") == "1":
    install_import_hook("flax_distil", "type_checker.check")
else:
    install_import_hook(
        [
            "flax_distil.audio",
            "flax_distil.text",
            "flax_distil.data",
            "flax_distil.fetch",
            "flax_distil.parallel",
            "flax_distil.model",
            "flax_distil.decode",
            "flax_distil.transcription",
            "flax_distil.pseudo_label",
            "flax_distil.distill",
            "flax_distil.evaluate",
            "flax_distil.export",
            "flax_distil.plan",
            "flax_distil.sweep",
        ],
        "type_checker.check",
    )

from flax_distil.cache import cache_folder

# Before jax is imported anywhere: one platform, eight pretended devices, compiled programs kept.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "tests" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest-xdist share the cores

import numpy as np
import pytest

from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.dims import WhisperDims


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of the programs that are compiled, or taken from JAX's cache, as the test goes on."""
    import jax

    names: list[str] = []

    def note(event: str, _seconds: float, **about: str) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


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
    from flax_distil.model.generation import generation_config
    from flax_distil.model.spec import Spec
    from flax_distil.model.student import init_student

    dims = WhisperDims(80, 51_864, 16, 1, 2, 2, 2, 64, 64)
    params = jax.device_get(Spec(dims).init(jax.random.key(0)))
    config = dims_to_hf(dims)
    teacher = Checkpoint(dims, params, config, generation_config(dims), tiny_en_folder)
    folder = tmp_path_factory.mktemp("random")
    save_checkpoint(teacher, folder / "teacher")
    save_checkpoint(init_student(teacher, 1), folder / "student")
    return folder / "teacher", folder / "student"


@pytest.fixture(scope="session")
def human_clips() -> list[tuple[np.ndarray, str]]:
    """Real speech of two people with its text: 16 kHz waveforms of 3 to 30 s, telephone prompts
    first and audiobook clips behind them. Synthetic speech where there is no apt."""
    from flax_distil.audio.load import load_audio
    from flax_distil.fetch.packages import lock
    from flax_distil.fetch.speech import human_prompts, read_manifest, sentences, synthesise

    folder = cache_folder() / "demo-speech" / "human"
    manifest = human_prompts(folder)
    if manifest is None:
        folder = cache_folder() / "tests" / "synthetic"
        texts = [text for text in sentences() if len(text.split()) > 12]
        with lock("test-speech"):
            manifest = synthesise(texts[:24], folder)
        clips = read_manifest(manifest)
        return [(load_audio(folder / clip.audio_filepath), clip.text) for clip in clips]
    long = [clip for clip in read_manifest(manifest) if 3 < clip.duration < 30]
    chosen = [clip for clip in long if clip.speaker == "allison"][::7][:20]
    chosen += [clip for clip in long if clip.speaker == "librivox"]
    return [(load_audio(folder / clip.audio_filepath), clip.text) for clip in chosen]


@pytest.fixture(scope="session")
def openai_tiny_en(tiny_en_folder):
    """openai-whisper's model with whisper-tiny.en's weights."""
    import torch
    import whisper
    from safetensors.numpy import load_file

    from flax_distil.model.dims import PUBLISHED
    from flax_distil.model.tensors import to_openai

    sizes, state = to_openai(PUBLISHED["tiny.en"], load_file(tiny_en_folder / "model.safetensors"))
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()
