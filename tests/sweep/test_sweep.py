"""A sweep from end to end with a tiny teacher: labels to report, once, with a run that fails."""

import json
import wave
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_distil import cli
from flax_distil.config import DistillConfig
from flax_distil.distill.runs import trained_student
from flax_distil.model.student import same_arrays
from flax_distil.recipe import load_recipe
from flax_distil.sweep import stages

# Sizes are those of other tests with the same models, so that compiled programs are found.
RECIPE = """
[pseudo-label]
model = "{teacher}"
output_dir = "{folder}/labels"
max_tokens = 4
timestamps = false
batch_size = 2
[pseudo-label.data]
source = "{folder}/clips.jsonl"

[filter]
source = "{folder}/labels"
output_dir = "{folder}/filtered"
max_wer = 1000.0
keep_unended = true

[init-student]
teacher = "{teacher}"
output_dir = "{folder}/init"
decoder_layers = 1

[distill]
teacher = "{teacher}"
student = "{folder}/init"
labels = ["{folder}/filtered"]
output_dir = "{folder}/distill"
batch_size = 8
prompt_probability = 0.0
label_buckets = [32]
[distill.optimizer]
steps = 2
warmup_steps = 1
[distill.compute]
dtype = "float32"
peak_flops = 1e11
[distill.run]
tensorboard = false

[export]
source = "{folder}/distill"
output_dir = "{folder}/student"

[evaluate]
models = ["{teacher}", "{folder}/student"]
datasets = ["{folder}/clips.jsonl"]
max_tokens = 6
batch_size = 3
resamples = 20

[sweep]
output_dir = "{folder}/sweep"
[sweep.fields]
filter.max_wer = [1.0, 1000.0]
distill.seed = [0, 1]
"""


@pytest.fixture(scope="module")
def swept(random_folders, tmp_path_factory) -> Path:
    """The folder of a sweep that has run; its clips are noise."""
    folder, random = tmp_path_factory.mktemp("sweep"), np.random.default_rng(0)
    rows = []
    for number in range(6):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(random.integers(-999, 999, 8_000 + 800 * number).astype("<i2"))
        rows.append({"audio": f"{number}.wav", "text": "one two", "language": "en"})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(teacher=random_folders[0], folder=folder))
    execute = stages.execute

    def quickly(config):
        """Training compiles as in tests/distill."""
        jax.config.update("jax_disable_most_optimizations", isinstance(config, DistillConfig))
        return execute(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "execute", quickly)
        patch.setattr(jax, "clear_caches", lambda: None)  # other tests have the same programs
        assert cli.main(["sweep", "--recipe", str(recipe)]) == 1  # a run failed
    return folder


def test_the_runs_are_compared_and_the_failed_one_is_reported(swept):
    report = json.loads((swept / "sweep" / "sweep.json").read_text())
    failed, whole = report["tables"]["max_wer"]
    assert (failed["max_wer"], failed["failed"], failed["WER %"]) == (1, "filter", None)
    assert (whole["labels"], whole["kept %"]) == (6, 100)
    assert whole["WER %"]["value"] > 90  # of noise, by random weights
    base, other = report["tables"]["seed"]
    assert other["difference"]["value"] == pytest.approx(
        other["WER %"]["value"] - base["WER %"]["value"]
    )
    assert other["loss"] != base["loss"]  # of other clips in the last batch
    assert "none of 6 labels is kept" in report["tables"]["failed"][0]["error"]
    assert [one["name"] for one in report["models"]] == ["teacher", "base", "seed=1"]


def test_each_run_trained_by_its_own_recipe(swept):
    """One filter and one student at the start for both; the trained ones differ."""
    folder = swept / "sweep"
    assert not (folder / "seed=1" / "filter").exists()
    assert not (folder / "seed=1" / "init-student").exists()
    recipe = folder / "seed=1" / "recipe.toml"
    assert load_recipe(recipe, DistillConfig).labels == (folder / "base" / "filter",)
    (_, one), (_, other) = (
        trained_student(folder / name / "distill") for name in ("base", "seed=1")
    )
    assert not same_arrays(one.params, other.params)


def test_the_next_start_repeats_the_failed_stage_alone(swept, monkeypatch):
    ran = []
    execute = stages.execute
    monkeypatch.setattr(stages.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(stages, "execute", lambda one: ran.append(one) or execute(one))
    assert cli.main(["sweep", "--recipe", str(swept / "recipe.toml")]) == 1
    assert [one.output_dir for one in ran] == [swept / "sweep" / "max_wer=1" / "filter"]


def test_a_stage_can_be_run_by_hand(swept):
    """The recipe of a run continues what the sweep did: nothing is decoded again."""
    recipe = swept / "sweep" / "seed=1" / "recipe.toml"
    times = swept / "sweep" / "seed=1" / "evaluate" / "results" / "batches.jsonl"
    before = times.read_bytes()
    assert cli.main(["evaluate", "--recipe", str(recipe)]) == 0
    assert times.read_bytes() == before
