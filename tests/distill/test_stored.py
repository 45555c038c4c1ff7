"""From labels that hold their teacher to a student that never met it."""

import json
import shutil
import wave
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    PseudoLabelConfig,
    RunConfig,
)
from flax_distil.distill.stored import tail_share, warn_of_tails
from flax_distil.distill.trainer import run
from flax_distil.errors import InputError
from flax_distil.pseudo_label import run as label

ALL_BUT_ONE = 51_863


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
def stores(random_folders, speech, tmp_path_factory):
    """All likeliest tokens but one, and final states."""
    folder = tmp_path_factory.mktemp("stores")
    asked = PseudoLabelConfig(
        DataConfig(str(speech), language="en"),
        str(random_folders[0]),
        folder / "likeliest",
        max_tokens=1,
        timestamps=False,
        batch_size=8,
    )
    label(replace(asked, top_k=ALL_BUT_ONE))
    label(replace(asked, teacher_states=True, output_dir=folder / "states"))
    return folder


@pytest.fixture
def labels(stores):
    return stores / "likeliest"


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


def test_losses_are_those_of_a_teacher_in_memory(config, stores, tmp_path):
    """All tokens but one are stored, so that only float16 differs: 1/2048 of 10.9 nats of entropy,
    times T² = 4. Final states are far nearer, for their errors are not all of a sign. The
    cross-entropy is the same."""
    found = {}
    for name, change in {
        "memory": {"stored_teacher": False},
        "likeliest": {},
        "states": {"labels": (stores / "states",)},
    }.items():
        one = replace(config, output_dir=tmp_path / name, **change)
        assert run(one).finished
        (line,) = (one.output_dir / "metrics.jsonl").read_text().splitlines()
        found[name] = json.loads(line)
    expected = found["memory"]
    assert expected["kl"] > 0.01
    np.testing.assert_allclose(found["likeliest"]["kl"], expected["kl"], atol=4 * 10.9 / 2048)
    np.testing.assert_allclose(found["states"]["kl"], expected["kl"], rtol=1e-3)
    for name in ("likeliest", "states"):
        np.testing.assert_allclose(found[name]["ce"], expected["ce"], rtol=1e-6)


def test_what_would_compare_other_contexts_is_refused(config, random_folders, labels, stores):
    for change, message in [
        ({"loss": LossConfig(temperature=3.0)}, "temperatures 1.0, 2.0 and the loss asks for 3.0"),
        ({"loss": LossConfig(mse=0.1)}, "no layers' hidden states to be near to"),
        ({"labels": (labels, stores / "states")}, "holds top_k .* and .* final states of width"),
        ({"teacher": str(random_folders[1])}, "was written by .* and the teacher is"),
    ]:
        with pytest.raises(InputError, match=message):
            run(replace(config, **change))
    settings = json.loads((labels / "labels.json").read_text())
    for change, message in [
        ({"timestamps": True}, "timestamp_probability 0.5 would drop some: set it to 1"),
        ({"task": "translate"}, "was labelled to translate and would be taught to transcribe"),
        ({"top_k": 0}, "holds no distributions of its teacher"),
    ]:
        other = config.output_dir / "other"
        shutil.copytree(labels, other, dirs_exist_ok=True)
        (other / "labels.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            run(replace(config, labels=(other,)))


def test_a_tail_that_knows_more_than_the_stored_tokens_is_said(config, tmp_path, caplog):
    """One token of probability 1/2; at temperature 2 it has 1 part and the tail 9."""
    (tmp_path / "data").mkdir()
    settings = {"top_k": 1, "top_k_temperatures": [1.0, 2.0]}
    (tmp_path / "labels.json").write_text(json.dumps(settings))
    half = np.log(0.5)
    row = {
        "top_tokens": [[7]],
        "top_log_probabilities": [[np.float16(half)]],
        "tails": [[half, half / 2 + np.log(9)]],
    }
    table = pa.Table.from_pylist([row, row])
    pq.write_table(table[:0], tmp_path / "data/00000.parquet")  # the filter dropped all of it
    assert tail_share(tmp_path, 0) == 0
    pq.write_table(table, tmp_path / "data/00001.parquet")
    assert tail_share(tmp_path, 0) == pytest.approx(0.5, abs=1e-3)
    assert tail_share(tmp_path, 1) == pytest.approx(0.9, abs=1e-3)
    warn_of_tails(tmp_path, 1, config)
    assert "at temperature 2, 90 % of the teacher's probability" in caplog.text
