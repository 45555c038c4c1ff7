"""Runs side by side, from files written by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flax_distil.cli import main
from flax_distil.config import DistillConfig, LossConfig, OptimizerConfig, RunsConfig
from flax_distil.distill.runs import run
from flax_distil.errors import InputError
from flax_distil.recipe import save_recipe


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two runs, the second better by WER; a line is cut off, and a recipe lies about."""
    config = DistillConfig("t", "s", tmp_path / "a", optimizer=OptimizerConfig(steps=20))
    lines = {
        "a": [{"step": n, "loss": 20.0 - n, "samples_per_second": float(n)} for n in range(1, 11)]
        + [{"step": 5, "validation/wer": 12.5}, {"step": 10, "validation/wer": 14.0}],
        "b/c": [
            {"step": 1, "loss": 3.0},
            {"step": 2, "loss": None, "skipped": 1.0},
            {"step": 2, "validation/wer": 11.0},
        ],
    }
    for name, found in lines.items():
        one = replace(config, output_dir=tmp_path / name)
        if name != "a":
            one = replace(one, seed=3, loss=LossConfig(kl=1.0))
        save_recipe(one, tmp_path / name / "recipe.toml")
        text = "".join(json.dumps(line) + "\n" for line in found) + '{"step": 99, "lo'
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "a" / "checkpoints" / "8").mkdir(parents=True)
    save_recipe(config, tmp_path / "notes" / "recipe.toml")
    return tmp_path


def test_the_best_comes_first(folder):
    best, other = run(RunsConfig(folder))
    expected = {"name": "b/c", "wer": 11.0, "wer_step": 2, "skipped": 1, "loss": 3.0}
    assert expected.items() <= best.items()
    assert best["saved"] is best["samples_per_second"] is None
    expected = {"name": "a", "step": 10, "steps": 20, "saved": 8, "loss": 10.0, "wer": 12.5}
    assert (expected | {"samples_per_second": 5.5}).items() <= other.items()


def test_tables_and_json(folder, capsys):
    assert main(["runs", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "12.50" in text
    assert "loss.kl" in text
    assert "output_dir" not in text
    assert main(["runs", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differing"] == ["seed", "loss.kl"]
    assert [one["name"] for one in found["runs"]] == ["b/c", "a"]


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="has no training run"):
        run(RunsConfig(tmp_path))
