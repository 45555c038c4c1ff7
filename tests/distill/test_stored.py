"""From labels that hold their teacher to a student that never met it."""

import json
import shutil
import wave
from dataclasses import replace

import numpy as np
import pytest

from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    PseudoLabelConfig,
    RunConfig,
    TrainingDataConfig,
)
from flax_distil.distill.trainer import run
from flax_distil.errors import InputError
from flax_distil.pseudo_label import run as label


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Eight clips of noise."""
    folder, random = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    for number in range(8):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(random.integers(-999, 999, 8_000 + 800 * number).astype("<i2"))
    rows = [{"audio": f"{number}.wav", "text": "one two"} for number in range(8)]
    path = folder / "noise.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def labels(random_folders, speech, tmp_path_factory):
    """A label store with the teacher's final states."""
    folder = tmp_path_factory.mktemp("labels")
    asked = PseudoLabelConfig(
        DataConfig(str(speech), language="en"),
        str(random_folders[0]),
        folder,
        teacher_states=True,
        max_tokens=1,
        timestamps=False,
        batch_size=8,
    )
    label(asked)
    return folder


@pytest.fixture
def config(random_folders, labels, tmp_path):
    return DistillConfig(
        teacher=str(random_folders[0]),
        student=str(random_folders[1]),
        labels=(labels,),
        output_dir=tmp_path / "run",
        batch_size=8,
        stored_teacher=True,
        optimizer=OptimizerConfig(steps=1, warmup_steps=0),
        compute=ComputeConfig(dtype="float32", peak_flops=1e11),
        run=RunConfig(tensorboard=False),
    )


def test_losses_are_those_of_a_teacher_in_memory(config, tmp_path):
    """The KL but for float16; the cross-entropy is the same."""
    found = {}
    for name, stored in {"memory": False, "states": True}.items():
        one = replace(config, output_dir=tmp_path / name, stored_teacher=stored)
        assert run(one).finished
        (line,) = (one.output_dir / "metrics.jsonl").read_text().splitlines()
        found[name] = json.loads(line)
    expected = found["memory"]
    assert expected["kl"] > 0.01
    np.testing.assert_allclose(found["states"]["kl"], expected["kl"], rtol=1e-3)
    np.testing.assert_allclose(found["states"]["ce"], expected["ce"], rtol=1e-6)


def test_what_would_compare_other_contexts_is_refused(config, random_folders, labels):
    for change, message in [
        ({"loss": LossConfig(mse=0.1)}, "no hidden states of layers to match"),
        ({"labels": (), "data": (TrainingDataConfig(str(labels)),)}, "needs label stores"),
        ({"teacher": str(random_folders[1])}, "was written by .* and the teacher is"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(config, **change))
    settings = json.loads((labels / "labels.json").read_text())
    for change, message in [
        ({"timestamps": True}, "timestamp_probability 0.5 would drop some: set it to 1"),
        ({"task": "translate"}, "was labelled to translate and would be taught to transcribe"),
        ({"teacher_states": 0}, "has no final states of its teacher"),
    ]:
        other = config.output_dir / "other"
        shutil.copytree(labels, other, dirs_exist_ok=True)
        (other / "labels.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            run(replace(config, labels=(other,)))
