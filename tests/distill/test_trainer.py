"""Whole runs of a few steps on eight pretended devices: what is saved, resumed, stopped, told."""

import errno
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_distil import files as files_module
from flax_distil.config import (
    ComputeConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from flax_distil.data.loader import LoaderState
from flax_distil.data.utterances import Utterance
from flax_distil.distill import flops, setup, trainer
from flax_distil.distill.check import check_config
from flax_distil.distill.checkpoints import read_params
from flax_distil.distill.flops import batch_flops, peak_flops, vocabulary_flops
from flax_distil.distill.setup import prepare
from flax_distil.distill.trainer import whole
from flax_distil.distill.validation import Validation
from flax_distil.errors import InputError


class Batches:
    """Ever new random batches by position; `then` is called when a position is asked for."""

    def __init__(self, make_batch, then=None):
        self.make_batch, self.then = make_batch, then or {}
        self.utterances = [Utterance(f"clip-{row}", b"") for row in range(8)]

    def batches(self, state):
        while True:
            batch = self.make_batch(8, seed=state.position)
            state = replace(state, position=state.position + 1)
            if state.position in self.then:
                batch = self.then[state.position](batch) or batch
            yield batch, state


def train(config, *parts):
    check_config(config)
    return trainer.train(config, *parts)


@pytest.fixture
def config(tmp_path) -> DistillConfig:
    return DistillConfig(
        teacher="teacher",
        student="student",
        labels=(),
        output_dir=tmp_path / "run",
        batch_size=8,
        max_skipped=2,
        seed=7,
        loss=LossConfig(mse=0.1),
        optimizer=OptimizerConfig(steps=6, warmup_steps=2, learning_rate=1e-3),
        compute=ComputeConfig(dtype="float32", peak_flops=1e9),
        run=RunConfig(save_every=2, tensorboard=False),
    )


def metrics(config, name="loss"):
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    return {(one := json.loads(line))["step"]: one[name] for line in lines if name in line}


def stop(_batch):
    signal.raise_signal(signal.SIGTERM)


def student_params(config, student, which="latest"):
    return read_params(config.output_dir, {"decoder": student.params["decoder"]}, which)


def test_resuming_twice_continues_to_the_last_bit(config, teacher, student, make_batch, tmp_path):
    whole = train(config, teacher, student, Batches(make_batch))
    assert (whole.steps, whole.finished, whole.skipped) == (6, True, 0)
    other = replace(config, output_dir=tmp_path / "other")
    # batches are fed one ahead: a signal while batch 3 is read stops after step 2
    first = train(other, teacher, student, Batches(make_batch, {3: stop}))
    assert (first.steps, first.finished) == (2, False)
    other = replace(other, run=replace(other.run, resume="must", save_every=100))
    second = train(other, teacher, student, Batches(make_batch, {6: stop}))
    assert (second.steps, second.finished) == (5, False)
    third = train(other, teacher, student, Batches(make_batch))
    assert (third.steps, third.finished) == (6, True)
    assert metrics(other) == metrics(config)
    assert list(metrics(config)) == [1, 2, 3, 4, 5, 6]
    assert third.loss == whole.loss == metrics(config)[6]
    (step, ours), (_, theirs) = student_params(other, student), student_params(config, student)
    assert step == 6
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def test_an_error_loses_no_step(config, teacher, student, make_batch):
    def fail(_batch):
        raise InputError("the disk with the audio is gone")

    with pytest.raises(InputError, match="audio is gone"):
        train(config, teacher, student, Batches(make_batch, {5: fail}))
    step, _ = student_params(config, student)
    assert step == 3  # batch 4 was waiting for batch 5
    again = replace(config, run=replace(config.run, resume="auto"))
    assert train(again, teacher, student, Batches(make_batch)).steps == 6
    assert list(metrics(config)) == [1, 2, 3, 4, 5, 6]


def test_wrong_folders_and_recipes_are_errors(config, teacher, student, make_batch):
    must = replace(config, run=replace(config.run, resume="must"))
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        train(must, teacher, student, Batches(make_batch))
    train(config, teacher, student, Batches(make_batch, {2: stop}))
    with pytest.raises(InputError, match="has checkpoints of a run: continue it with"):
        train(config, teacher, student, Batches(make_batch))
    other = replace(must, loss=LossConfig(kl=1.0), seed=8)
    with pytest.raises(
        InputError, match=r"recipe: seed \(was 7, is 8\); loss.kl \(was 0.8, is 1.0\); loss.mse"
    ):
        train(other, teacher, student, Batches(make_batch))
    longer = replace(must, optimizer=replace(config.optimizer, steps=100))
    with pytest.raises(
        InputError, match=r"another recipe: optimizer.steps \(was 6, is 100\). Resume"
    ):
        train(longer, teacher, student, Batches(make_batch))


def test_misfits_are_told_before_anything_is_computed(config, teacher, student, make_batch):
    for change, message in [
        ({"batch_size": 12}, "batch 12 does not divide over 8 data shards: use 8 or 16"),
        ({"compute": ComputeConfig(tensor=4)}, "2 heads, which do not divide over 4"),
        ({"loss": LossConfig(kl=0, ce=0)}, "one must be positive"),
        ({"loss": LossConfig(temperature=0.0)}, "temperature 0 must be positive"),
        (
            {"optimizer": OptimizerConfig(10, warmup_steps=11)},
            "11 warm-up steps do not fit into 10",
        ),
        ({"batch_size": 0}, "batch_size 0 must be 1 or more, or -1"),
        ({"optimizer": OptimizerConfig(max_gradient_norm=0.0)}, "max_gradient_norm 0 must be pos"),
        ({"run": RunConfig(save_every=0)}, "save_every 0 must be 1 or more"),
        ({"run": RunConfig(workers=0)}, "workers 0 must be 1 or more"),
        ({"lanes": 0}, "lanes 0 must be 1 or more"),
        ({"validation": ValidationConfig(every=0)}, "every 0 must be 1 or more"),
        ({"prompt_probability": 20.0}, "prompt_probability 20 must be between 0 and 1"),
        ({"language": "Klingon"}, "Whisper has no language"),
        ({"label_buckets": ()}, "name lengths from 1 to 448 tokens"),
        ({"output_dir": Path(__file__)}, r"cannot write to .*test_trainer.py: choose"),
        ({"label_buckets": (64, 512)}, "name lengths from 1 to 448 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            train(replace(config, **change), teacher, student, Batches(make_batch))
    other = replace(student, dims=replace(student.dims, vocab=97))
    with pytest.raises(InputError, match="teacher has vocab 96 and the student 97"):
        train(config, teacher, other, Batches(make_batch))


def test_an_update_that_needs_more_memory_than_is_free_is_not_begun(
    config, teacher, student, make_batch, monkeypatch
):
    program, state = prepare(config, teacher, student)
    batch = make_batch(8)
    monkeypatch.setattr(setup, "free_memory", lambda: 2**10)
    with pytest.raises(
        InputError, match=r"an update of 8 clips with 8 tokens needs .* 0\.0 GiB can"
    ):
        program.step(state, program.frozen, batch)
    monkeypatch.setattr(setup, "free_memory", lambda: 2**40)
    assert program.step(state, program.frozen, batch)[0].step == 1
    for free, remedy in ((10, "--compute.accumulation 8"), (0, "--compute.remat")):
        with pytest.raises(
            InputError, match=rf"needs 50\.0 .* {free}\.0 GiB can be used: set {remedy}"
        ):
            setup.check_memory(50 * 2**30, free * 2**30, 64, 32, program.spec)


def test_the_best_of_the_validations_is_kept(config, teacher, student, make_batch):
    wers, seen = iter([50.0, 30.0, 40.0, 35.0]), []

    def validate(params):
        seen.append(jax.tree.map(np.array, params))
        wer = next(wers)
        return Validation({"clean": wer - 10, "noisy": wer + 10})

    validation = ValidationConfig(every=1, patience=2)
    config = replace(config, validation=validation)
    summary = train(config, teacher, student, Batches(make_batch), validate)
    assert (summary.steps, summary.finished) == (4, True)  # two without a new best
    assert (summary.best_wer, summary.best_step) == (30.0, 2)
    assert metrics(config, "validation/wer") == {1: 50.0, 2: 30.0, 3: 40.0, 4: 35.0}
    assert metrics(config, "validation/noisy")[1] == 60.0
    step, best = student_params(config, student, "best")
    assert step == 2
    same = jax.tree.map(np.array_equal, best["decoder"], seen[1]["decoder"])
    assert all(jax.tree.leaves(same))
    assert student_params(config, student, 4)[0] == 4
    with pytest.raises(InputError, match="has no checkpoint 9; it has 2, 3, 4"):
        student_params(config, student, 9)

    # Rates on other clips are compared among themselves.
    wers, validation = iter([90.0, 80.0]), replace(validation, labels=(Path("other"),))
    again = replace(config, validation=validation, run=replace(config.run, resume="must"))
    summary = train(again, teacher, student, Batches(make_batch), validate)
    assert (summary.best_wer, summary.best_step) == (80.0, 6)


def test_non_finite_batches_stop_the_run_and_name_their_clips(
    config, teacher, student, make_batch, caplog
):
    def spoil(batch):
        return replace(batch, weights=np.full_like(batch.weights, np.nan))

    spoilt = Batches(make_batch, {2: spoil, 4: spoil, 5: spoil})
    with (
        caplog.at_level(logging.INFO, "flax_distil"),
        pytest.raises(InputError, match="2 updates in a row were not finite, the last at step 5"),
    ):
        train(config, teacher, student, spoilt)
    warnings = [r.getMessage() for r in caplog.records if "not finite and is" in r.getMessage()]
    assert warnings[0].startswith("step 2 was not finite and is skipped; its clips: clip-0, clip-1")
    step, params = student_params(config, student)
    assert step >= 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert sum("step 1/6  loss" in r.getMessage() for r in caplog.records) == 1


def test_loader_position_is_saved(config, teacher, student, make_batch):
    asked = []

    class Spy(Batches):
        def batches(self, state):
            asked.append(state)
            return super().batches(state)

    train(config, teacher, student, Spy(make_batch, {4: stop}))
    train(
        replace(config, run=replace(config.run, resume="must")), teacher, student, Spy(make_batch)
    )
    assert asked == [LoaderState(seed=7), LoaderState(seed=7, position=3)]


def test_a_full_disk_while_resuming_leaves_every_file(
    config, teacher, student, make_batch, monkeypatch
):
    """Another recipe would be written where changes are allowed: it is not, and the old one stays,
    so that the run goes on where there is room again."""
    train(config, teacher, student, Batches(make_batch, {4: stop}))
    folder = config.output_dir
    files = [path for path in folder.iterdir() if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    must = replace(config, run=replace(config.run, resume="must", keep=3))

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files_module.os, "fsync", refuse)
    with pytest.raises(InputError, match=r"cannot write .*recipe\.toml: No space left on device"):
        train(must, teacher, student, Batches(make_batch))
    assert {path: path.read_bytes() for path in files} == before
    monkeypatch.undo()
    (folder / ".recipe.toml.host.1.partial").write_bytes(b"half")
    assert train(must, teacher, student, Batches(make_batch)).finished
    assert not list(folder.glob(".*"))


def test_the_whole_student_is_copied_by_one_program(
    config, teacher, student, monkeypatch, compilations
):
    """On several hosts, at every validation."""
    program, state = prepare(config, teacher, student)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(trainer, "replicate", lambda params: params)
    whole(program, state)
    compilations.clear()
    whole(program, state)
    assert not compilations


def test_the_peak_is_configured_or_published_or_measured(config, monkeypatch):
    known = replace(config, compute=ComputeConfig(dtype="bfloat16"))
    assert peak_flops(config) == (1e9, "configured")
    monkeypatch.setattr(flops, "measured_peak", lambda *_: 8e9)
    assert peak_flops(known) == (1e9, "measured in products")  # of eight devices
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")])
    assert peak_flops(known) == (989.4e12, "published")


def test_padding_is_no_work_of_the_vocabulary(config, teacher, student, make_batch):
    config = replace(config, compute=replace(config.compute, vocabulary_chunk=1))
    program, _ = prepare(config, teacher, student)
    batch = make_batch(8)
    short = replace(batch, weights=batch.weights * (np.arange(8) < 3))
    tokens = lambda one: 8 * np.count_nonzero(one.weights, axis=1).max()  # of 8 shards of a row
    a_token = 4 * vocabulary_flops(teacher.dims, 1)
    saved = batch_flops(program.spec, batch, 1) - batch_flops(program.spec, short, 1)
    assert saved == a_token * (tokens(batch) - tokens(short)) > 0


def test_a_run_without_sound_is_no_success(config, teacher, student, make_batch):
    """No clip of any batch can be used: it stops, and does not end with a loss of 0."""
    silent = lambda batch: replace(batch, weights=0 * batch.weights)
    with pytest.raises(
        InputError, match=r"the last 2 batches, to step 3, .*clip-0, clip-1, clip-2"
    ):
        train(config, teacher, student, Batches(make_batch, {2: silent, 3: silent}))
    short = replace(
        config, output_dir=config.output_dir / "short", max_skipped=10,
        optimizer=replace(config.optimizer, steps=2),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"16 of 16 clips could not be used to step 2"):
        train(short, teacher, student, Batches(make_batch, {1: silent, 2: silent}))


def test_too_many_clips_that_cannot_be_used_stop_a_run(config, teacher, student, make_batch):
    def five_lost(batch):
        return replace(batch, weights=batch.weights * (np.arange(8) >= 5)[:, None])

    lost = Batches(make_batch, dict.fromkeys(range(1, 7), five_lost))
    with pytest.raises(InputError, match=r"10 of 16 clips .* step 2 .* max_skipped_share 0\.5"):
        train(config, teacher, student, lost)
    more = replace(config, output_dir=config.output_dir / "more", max_skipped_share=0.7)
    assert train(more, teacher, student, lost).finished
