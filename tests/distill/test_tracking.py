import json
import resource
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from flax_distil.config import DistillConfig, RunConfig
from flax_distil.distill import check, tracking
from flax_distil.distill.tracking import (
    METRICS,
    Speed,
    Tracker,
    environment,
    line,
    source_of,
)
from flax_distil.distill.trainer import run
from flax_distil.errors import InputError

VALUES = {
    "loss": 2.5,
    "kl": 0.5,
    "ce": 2.0,
    "mse": 0.0,
    "gradient_norm": 0.75,
    "learning_rate": 1e-4,
}

NO_COMMIT = {"commit": None, "changed": None}


@pytest.fixture
def config(tmp_path):
    return DistillConfig("t", "s", tmp_path)


def test_jsonl_and_tensorboard(config):
    with Tracker(config) as tracker:
        for step in (1, 2):
            tracker.scalars(step, {"loss": 1 / step, "validation/wer": 10.0})
    lines = (config.output_dir / METRICS).read_text().splitlines()
    assert [json.loads(one) for one in lines] == [
        {"step": 1, "loss": 1.0, "validation/wer": 10.0},
        {"step": 2, "loss": 0.5, "validation/wer": 10.0},
    ]
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (config.output_dir / "tensorboard").iterdir()
    found = [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert found == [
        (1, "loss", 1.0),
        (1, "validation/wer", 10.0),
        (2, "loss", 0.5),
        (2, "validation/wer", 10.0),
    ]


def test_a_resumed_run_writes_no_step_twice(config):
    config = replace(config, run=RunConfig(tensorboard=False))
    with Tracker(config) as tracker:
        for step in (1, 2, 3):
            tracker.scalars(step, {"loss": 0.0})
    with (config.output_dir / METRICS).open("a") as file:
        file.write('{}\n[1]\n{"step": 4, "lo')  # a user, and a kill
    with Tracker(config, start=2) as tracker:
        tracker.scalars(3, {"loss": 1.0})
    lines = (config.output_dir / METRICS).read_text().splitlines()
    assert [json.loads(one)["step"] for one in lines] == [1, 2, 3]
    assert json.loads(lines[-1])["loss"] == 1.0


def test_wandb_is_missed_before_any_work(config, monkeypatch):
    monkeypatch.setattr(check, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install flax-distil\[wandb\]"):
        run(replace(config, run=RunConfig(wandb="project")))  # neither teacher nor student exist


def test_wandb_continues_a_run_and_mixes_no_two(config, monkeypatch):
    """Two folders of the same name are two runs; a resumed folder is one."""
    begun, logged = [], []

    def init(**given):
        begun.append(given)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=list)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    options = RunConfig(tensorboard=False, wandb="project")
    for recipe, start in (("a", 0), ("b", 0), ("a", 1)):
        folder = config.output_dir / recipe / "distill"
        with Tracker(replace(config, output_dir=folder, run=options), start) as tracker:
            tracker.scalars(start + 1, {"loss": 2.0})
    first, second, again = (one["id"] for one in begun)
    assert first == again != second
    assert len(first) == 8
    assert [one["name"] for one in begun] == ["a/distill", "b/distill", "a/distill"]
    assert begun[0]["project"] == "project"
    assert begun[0]["config"]["loss"]["temperature"] == 2.0
    assert logged == [(1, {"loss": 2.0}), (1, {"loss": 2.0}), (2, {"loss": 2.0})]


def test_speed_leaves_compilation_and_pauses_out(monkeypatch):
    now = iter([0.0, 10.0, 100.0, 104.0])
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: next(now))
    speed = Speed(peak=1e9, steps_left=10)
    speed.finished(4, 8.0, 1e9)  # opens the clock at 0 s
    assert speed.rates() == {}
    for _ in range(5):
        speed.finished(4, 8.0, 1e9)
    rates = speed.rates()  # at 10 s
    assert rates["samples_per_second"] == 2.0
    assert rates["audio_hours_per_hour"] == 4.0
    assert rates["mfu"] == 0.5
    assert rates["eta_seconds"] == 2.0 * 4
    speed.pause()
    speed.finished(4, 8.0, 1e9)  # opens it again at 100 s
    speed.finished(4, 8.0, 1e9)
    assert speed.rates()["samples_per_second"] == 1.0


def test_line():
    assert line(7, 1000, VALUES) == (
        "step    7/1000  loss 2.5000 (kl 0.500, ce 2.000)  |g| 0.75  lr 1.00e-04"
    )
    rates = {
        "samples_per_second": 31.25,
        "audio_hours_per_hour": 61.52,
        "mfu": 0.412,
        "eta_seconds": 11_565.0,
    }
    assert line(7, 1000, VALUES | rates).endswith(
        "  31.25 samples/s  61.5 h/h  MFU 41.2 %  ETA 3:12:45"
    )
    late = line(7, 1000, VALUES | rates | {"eta_seconds": 59.6})
    assert late.endswith("ETA 0:01:00")


def test_a_full_disk_is_named_by_the_file_it_refuses(config, monkeypatch):
    config = replace(config, run=RunConfig(tensorboard=False))
    with Tracker(config) as tracker:
        tracker.scalars(1, {"loss": 0.0})
    path = config.output_dir / METRICS
    inode = path.stat().st_ino
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with (
            pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: File too large"),
            Tracker(config, start=1) as tracker,  # drops nothing, so it writes nothing
        ):
            tracker.scalars(2, {"loss": 0.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_ino == inode
    assert json.loads(path.read_text().splitlines()[0])["step"] == 1


def test_environment_names_versions():
    found = environment()
    assert found["versions"]["jax"]
    assert {"commit", "changed"} <= set(found)


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_package_alone(tmp_path, monkeypatch, tracked):
    """A repository around a package that was installed into it is another project's."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b.c")
    file = tmp_path / "lib" / "flax_distil" / "distill" / "tracking.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    (tmp_path / "theirs.txt").write_text("1")

    def git(*words):
        done = subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
        return done.stdout.decode().strip()

    git("init")
    git("add", "." if tracked else "theirs.txt")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "theirs.txt").write_text("2")
    expected = {"commit": commit, "changed": False} if tracked else NO_COMMIT
    assert source_of(file) == expected
    file.write_text("2")
    assert source_of(file) == (expected | {"changed": True} if tracked else NO_COMMIT)
