"""Programs of a small model for 30 s windows, compiled for a v4-8 once a session."""

import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from flax_distil.cache import cache_folder, compile_aside
from flax_distil.plan.topology import WITHOUT_TPU, libtpu_version, tpu_slice

for name, value in WITHOUT_TPU.items():
    os.environ.setdefault(name, value)

RECIPE = Path(__file__).parents[2] / "recipes" / "large-v2-32-2.toml"


class Chosen(NamedTuple):
    """What the small programs are made of."""

    config: object
    teacher: object
    student: object
    chips: list


@pytest.fixture(scope="session")
def chosen() -> Chosen:
    if not libtpu_version():
        pytest.skip("libtpu has wheels for x86-64 Linux alone")
    from flax_distil.config import DistillConfig
    from flax_distil.model.dims import PUBLISHED
    from flax_distil.plan.topology import devices
    from flax_distil.recipe import load_recipe

    config = replace(load_recipe(RECIPE, DistillConfig), batch_size=8)
    config = replace(config, compute=replace(config.compute, vocabulary_chunk=64))
    sizes = {"encoder_layers": 2, "vocab": 2048, "width": 256, "encoder_ffn": 1024}
    sizes |= {"encoder_heads": 4, "decoder_heads": 4, "decoder_ffn": 1024}
    teacher = replace(PUBLISHED["large-v2"], decoder_layers=3, **sizes)
    student = replace(teacher, decoder_layers=2)
    return Chosen(config, teacher, student, devices(tpu_slice("v4-8")))


@pytest.fixture(scope="session")
def train_text(chosen) -> str:
    """The train step, 2 clips a chip with labels of 128 tokens."""
    from flax_distil.plan.planner import train_program

    program = train_program(chosen.config, chosen.teacher, chosen.student, chosen.chips, 128)
    return text_of(program)


@pytest.fixture(scope="session")
def accumulated_text(chosen) -> str:
    """The same step with four micro-batches of as many clips."""
    from flax_distil.plan.planner import train_program

    config = replace(chosen.config, batch_size=4 * chosen.config.batch_size)
    config = replace(config, compute=replace(config.compute, accumulation=4))
    return text_of(train_program(config, chosen.teacher, chosen.student, chosen.chips, 128))


@pytest.fixture(scope="session")
def student_text(chosen) -> str:
    """The student's part of the step for a v5e-8, of whisper-small's width."""
    from flax_distil.plan.planner import train_program
    from flax_distil.plan.topology import devices

    config = replace(chosen.config, batch_size=16, stored_teacher=True, audio_states=Path("states"))
    sizes = {"width": 768, "encoder_ffn": 3072, "encoder_heads": 12}
    sizes |= {"decoder_ffn": 3072, "decoder_heads": 12}
    teacher, student = (replace(dims, **sizes) for dims in (chosen.teacher, chosen.student))
    chips = devices(tpu_slice("v5e-8"))
    return text_of(train_program(config, teacher, student, chips, 128), "v5e-8")


@pytest.fixture(scope="session")
def recognition_texts(chosen) -> tuple[str, str]:
    """Encoder and greedy search of the teacher, 64 clips a chip."""
    from flax_distil.options import DecodeOptions
    from flax_distil.plan.planner import decode_programs

    options = DecodeOptions(max_tokens=64)
    # The rules know Whisper's vocabularies alone.
    teacher = replace(chosen.teacher, vocab=51_865, encoder_layers=1, decoder_layers=2)
    programs = decode_programs(teacher, "bfloat16", 64, options, chosen.chips, 64)
    encode, decode = map(text_of, programs)
    return encode, decode


def text_of(program, slice: str = "v4-8") -> str:
    """The compiled program; kept, for the compiler takes 20 s."""
    from flax_distil.plan.compiler import fingerprint

    name = fingerprint(program, tpu_slice(slice))
    path = cache_folder() / "tests" / "tpu" / f"{name}.gz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(compile_aside(program.lowered).as_text().encode()))
        part.replace(path)
    return gzip.decompress(path.read_bytes()).decode()
