"""The demo on a few clips: every stage meets the next."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from flax_distil import cli, demo
from flax_distil.config import DemoConfig
from flax_distil.data.utterances import read_dataset
from flax_distil.distill.trainer import TrainSummary
from flax_distil.model.checkpoint import load_checkpoint

SIZES = "--sentences 12 --heldout 2 --single 4 --clips 8 --steps 3 --batch-size 2 --max-tokens 94"
SIZES += " --non-speech 3 --heldout-non-speech 2 --share 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Walked as a user starts it, on one device."""
    folder = tmp_path_factory.mktemp("demo")
    command = [Path(sys.executable).parent / "flax-distil", "demo", "--output-dir", folder]
    done = subprocess.run(
        [*command, *SIZES.split()],
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"in PyTorch: (\d+) of \1 of the student's texts are the same", done.stdout)
    return folder


def test_the_student_is_read_by_both_methods(folder):
    """Its packed labels have timestamps and its single ones none; the report has both figures."""
    for name, timestamps in (("packed", True), ("single", False), ("non-speech", False)):
        settings = json.loads((folder / "labels" / name / "labels.json").read_text())
        assert settings["timestamps"] is timestamps
    report = json.loads((folder / "report.json").read_text())
    human = (folder / "speech" / "heldout-human.jsonl").exists()
    rows = report["tables"]["long"]
    assert len(rows) == 2 * (1 + human)
    assert all(row["WER %"]["value"] < 25 for row in rows if row["model"] == "teacher")
    assert (folder / "report.html").is_file()
    (start,) = report["tables"]["agreement"]
    assert all(0 <= start[f"Δ no-speech, {kind}"] <= 1 for kind in ("speech", "non-speech"))


def test_silence_and_noise_are_among_the_labels(folder):
    rows = list(read_dataset(folder / "filtered" / "non-speech").iter_from(0))
    assert [row.speaker for row in rows] == ["silence", "white", "brown"]
    assert not any(row.speech or row.text for row in rows)


def test_the_report_has_teacher_student_and_the_untrained_one(folder):
    report = json.loads((folder / "report.json").read_text())
    models = report["models"]
    assert [model["name"] for model in models] == ["teacher", "student"]
    teacher, student = models
    assert teacher["parameters"] == 37_760_256
    assert student["parameters"] < teacher["parameters"]
    assert re.fullmatch(r"error rate \d+\.\d %", report["settings"]["untrained student"])
    assert {row["clips"] for row in report["tables"]["non-speech"]} == {2}
    assert teacher["wer"] < 25  # it is a real Whisper on real speech
    assert teacher["relative_speed"] == 1
    assert all(model["rtf"] > 0 for model in models)


def test_training_moved_the_decoder_and_nothing_else(folder):
    before = load_checkpoint(folder / "student-untrained").params
    after = load_checkpoint(folder / "student").params
    assert all(map(same, jax.tree.leaves(before["encoder"]), jax.tree.leaves(after["encoder"])))
    assert not any(map(same, jax.tree.leaves(before["decoder"]), jax.tree.leaves(after["decoder"])))


def test_a_slow_machine_does_less_and_goes_on_with_the_same(tmp_path, monkeypatch):
    config = DemoConfig(tmp_path)
    full = demo.FULL_SPEED[config.teacher]
    for speed, share in ((full / 4, 0.25), (full, 0.25)):
        monkeypatch.setattr(demo, "measured_peak", lambda *_, speed=speed: speed)
        scaled = demo.scaled(config)
        assert scaled.share == share
        assert scaled.steps == config.steps // 4
        assert scaled.heldout == config.heldout
    (tmp_path / "recipe.toml").unlink()
    assert demo.scaled(config).steps == config.steps


def test_the_demo_ends_where_its_training_is_stopped(tmp_path, monkeypatch, capsys):
    """SIGTERM at update 2: nothing is exported, and the status is not that of success."""
    speech = SimpleNamespace(sources="none", train=tmp_path)
    monkeypatch.setattr(demo, "fetch_weights", lambda *_: tmp_path)
    monkeypatch.setattr(demo, "label", lambda *_: (tmp_path,))
    monkeypatch.setattr(demo, "demo_speech", lambda *_, **__: speech)
    monkeypatch.setattr(demo.student, "run", lambda _: None)
    stopped = TrainSummary(tmp_path, 2, False, 1.0, 0, None, None)
    monkeypatch.setattr(demo.trainer, "run", lambda _: stopped)
    monkeypatch.setattr(demo.export, "run", lambda _: pytest.fail("exported a stopped run"))
    status = cli.main(["demo", "--output-dir", str(tmp_path), *SIZES.split()])
    assert status == 3
    assert "training was stopped at update 2 of 3" in capsys.readouterr().err


def same(one, other) -> bool:
    return (one == other).all()
