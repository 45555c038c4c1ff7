"""From files to files: labels and two model folders in, a run's folder and its student out."""

import json
import logging
import wave
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_distil.config import (
    ComputeConfig,
    DistillConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from flax_distil.distill.runs import trained_student
from flax_distil.distill.trainer import run
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.recipe import load_recipe


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Ten clips of noise with labels, as a manifest."""
    folder, random = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    rows = []
    for number in range(10):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(random.integers(-999, 999, 8_000 + 800 * number).astype("<i2"))
        tokens = random.integers(300, 5_000, 3 + number).tolist()
        rows.append({"audio": f"{number}.wav", "text": "one two", "token_ids": tokens})
    path = folder / "noise.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_leaves_everything(random_folders, labels, tmp_path, caplog):
    teacher, student = random_folders
    config = DistillConfig(
        teacher=str(teacher),
        student=str(student),
        labels=(labels,),
        output_dir=tmp_path / "run",
        batch_size=8,
        optimizer=OptimizerConfig(steps=2, warmup_steps=1),
        compute=ComputeConfig(dtype="float32", peak_flops=1e11),
        validation=ValidationConfig(
            (labels,), losses=True, batch_size=4, max_clips=3, max_tokens=4
        ),
        run=RunConfig(log_every=1),
    )
    with caplog.at_level(logging.INFO, "flax_distil"):
        summary = run(config)
    assert "reference  one two" in caplog.text  # a sample of what was judged
    assert (summary.steps, summary.finished, summary.best_step) == (2, True, 2)
    assert summary.best_wer >= 90  # noise into random weights
    folder = config.output_dir
    assert load_recipe(folder / "recipe.toml", DistillConfig) == config
    assert json.loads((folder / "versions.json").read_text())["versions"]["jax"] == jax.__version__
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[1]["tokens"] > 0
    assert {"samples_per_second", "mfu", "audio_hours_per_hour", "eta_seconds"} <= set(lines[1])
    assert 0 < lines[2]["validation/noise/kl"] < lines[2]["validation/noise/ce"] < 20
    assert lines[2]["validation/noise"] == lines[2]["validation/wer"] == summary.best_wer

    begun = load_checkpoint(student)
    for which in ("best", "latest", 2):
        step, trained = trained_student(folder, which)
        assert step == 2
        assert jax.tree.structure(trained.params) == jax.tree.structure(begun.params)
        same = jax.tree.map(np.array_equal, trained.params, begun.params)
        assert all(jax.tree.leaves(same["encoder"]))
        assert not same["decoder"]["norm"]["scale"]
        moved = (
            trained.params["decoder"]["norm"]["scale"] - begun.params["decoder"]["norm"]["scale"]
        )
        assert 1e-6 < np.abs(moved).max() < 3e-4  # two updates of at most 1e-4

    with pytest.raises(InputError, match="is not a training run"):
        trained_student(tmp_path)
    with pytest.raises(InputError, match="has checkpoints of a run"):
        run(config)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"audio": str(labels.parent / "0.wav"), "text": None}))
    for sets, message in [
        ((labels, labels), "two validation sets are called noise"),
        ((bare,), "bare.jsonl has no clip with a reference to validate on"),
    ]:
        validation = replace(config.validation, labels=sets)
        with pytest.raises(InputError, match=message):
            run(replace(config, output_dir=tmp_path / "other", validation=validation))


def test_more_batches_compile_nothing_more(random_folders, labels, tmp_path, compilations):
    """Labels of 5 to 14 tokens with their prompt: one program for each bucket, and no other."""
    teacher, student = random_folders

    def programs(steps: int, *buckets: int) -> Counter[str]:
        compilations.clear()
        config = DistillConfig(
            teacher=str(teacher),
            student=str(student),
            labels=(labels,),
            output_dir=tmp_path / f"{steps}",
            batch_size=8,
            label_buckets=buckets,
            seed=steps,
            optimizer=OptimizerConfig(steps, warmup_steps=1),
            compute=ComputeConfig(dtype="float32", peak_flops=1e11),
            run=RunConfig(save_every=100, tensorboard=False),
        )
        assert run(config).steps == steps
        return Counter(compilations)

    few, many = programs(2, 16), programs(7, 13, 16)
    assert few["jit(step)"] == 1
    assert many - few == {"jit(step)": 1}
