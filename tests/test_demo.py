"""The demo on a few clips: every stage meets the next, and a second walk changes nothing."""

import json

import pytest

from flax_distil import demo
from flax_distil.config import DemoConfig
from flax_distil.model.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DemoConfig:
    """Walked once."""
    config = DemoConfig(
        tmp_path_factory.mktemp("demo"),
        sentences=12,
        heldout=2,
        single=4,
        clips=8,
        steps=3,
        batch_size=2,
    )
    demo.run(config)
    return config


def test_the_report_has_the_three_models(config):
    models = json.loads((config.output_dir / "report.json").read_text())["models"]
    assert [model["name"] for model in models] == ["teacher", "untrained", "student"]
    teacher, untrained, student = models
    assert teacher["parameters"] == 37_760_256
    assert untrained["parameters"] == student["parameters"] < teacher["parameters"]
    assert teacher["wer"] < 25  # it is a real Whisper on real speech
    assert teacher["relative_speed"] == 1
    assert all(model["rtf"] > 0 for model in models)


def test_training_moved_the_decoder_and_nothing_else(config):
    before = load_checkpoint(config.output_dir / "student-untrained").params
    after = load_checkpoint(config.output_dir / "student").params
    assert all(map(same, leaves(before["encoder"]), leaves(after["encoder"])))
    assert not any(map(same, leaves(before["decoder"]), leaves(after["decoder"])))


def test_walked_again_it_gives_the_same_student(config):
    weights = config.output_dir / "student" / "model.safetensors"
    before, metrics = weights.read_bytes(), config.output_dir / "distill" / "metrics.jsonl"
    lines = metrics.read_text().count("\n")
    demo.run(config)
    assert weights.read_bytes() == before
    assert metrics.read_text().count("\n") == lines  # no step was made twice


def leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


def same(one, other) -> bool:
    return (one == other).all()
