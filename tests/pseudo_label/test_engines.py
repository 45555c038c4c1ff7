"""Who makes the shards: hosts by number, or actors of Ray; on a disk or in a bucket."""

import dataclasses
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from fake_teacher import fake_labeller, fake_teacher, label_with
from test_filter import store
from test_labeller import contents

from flax_distil.cli import main
from flax_distil.config import FilterConfig
from flax_distil.data.utterances import UtteranceStream, read_dataset
from flax_distil.errors import InputError
from flax_distil.pseudo_label import labeller
from flax_distil.pseudo_label.labeller import label
from flax_distil.pseudo_label.ray_engine import placement, start_engines
from flax_distil.pseudo_label.store import LabelStore, shard_files
from flax_distil.sweep.points import SweepStage
from flax_distil.sweep.stages import run_on_ray

# Ray starts its processes by fork; other tests of this process may have started JAX's threads. A
# labelling command does not: Ray's driver uses no accelerator.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def label_with_ray(config, load, utterances=None):
    job = fake_labeller(config, utterances=utterances).job
    (engine,) = start_engines(config, load, [job])
    return label(job, engine)


def load_fake(config, tokens_that_kill=None, utterances=None):
    """The job and teacher of an actor, which dies the first time that it labels a clip."""

    def teacher(waveforms, language):
        hypotheses = fake_teacher(waveforms, language)
        died = Path(f"{config.output_dir}.died")
        if any(one.tokens == tokens_that_kill for one in hypotheses) and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return hypotheses

    return [fake_labeller(config, utterances=utterances).job], teacher


@pytest.fixture(scope="module")
def ray():
    """A cluster on this machine with room for two actors."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        here, package = Path(__file__).parent, Path(labeller.__file__).parents[2]
        patch.setenv("PYTHONPATH", f"{package}:{here}")
        ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, logging_level="warning")
        yield ray
        ray.shutdown()


def test_a_killed_actor_s_shard_is_made_again(config, tmp_path, ray):
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    config = dataclasses.replace(config, ray_workers=2)
    summary = label_with_ray(config, partial(load_fake, config, (1, 2, 9)))
    assert Path(f"{config.output_dir}.died").exists()
    assert (summary.labels, summary.rate) == (21, "WER")
    assert contents(config.output_dir) == contents(tmp_path / "whole")


def test_actors_get_the_utterances_of_a_stream(config, tmp_path, ray):
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    listed = read_dataset(config.data)
    stream = UtteranceStream(list(listed.rows), listed.columns, config.data)
    config = dataclasses.replace(config, ray_workers=1)
    label_with_ray(config, partial(load_fake, config, utterances=stream), stream)
    shards = {name: data for name, data in contents(tmp_path / "whole").items() if "data/" in name}
    assert shards == {n: d for n, d in contents(config.output_dir).items() if "data/" in n}
    assert LabelStore(config.output_dir, {}).complete()


def test_skips_and_errors_of_actors_end_the_run(config, ray):
    config = dataclasses.replace(config, ray_workers=1)
    limited = dataclasses.replace(config, max_skipped_share=0.0)
    with pytest.raises(InputError, match=r"1 of 23 clips were skipped.*first: 5\.flac"):
        label_with_ray(limited, partial(load_fake, config))
    part = dataclasses.replace(config, store_audio="reference", pack_seconds=1.0)
    part = dataclasses.replace(part, output_dir=config.output_dir / "part")
    with pytest.raises(InputError, match="is not a file of its own"):
        label_with_ray(part, partial(load_fake, part))


def test_the_command_line_writes_the_same_with_ray(config, random_folders, tmp_path, ray):
    teacher, _ = random_folders
    command = f"pseudo-label {config.data.source} --model {teacher} --limit 6 --batch-size 2"
    command += " --shard-size 2 --max-tokens 4 --output-dir"
    assert main([*command.split(), str(tmp_path / "local")]) == 0
    assert main([*command.split(), str(tmp_path / "ray"), "--engine", "ray"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_stages_of_a_sweep_are_tasks(tmp_path, ray):
    """A stage waits for the one whose folder it reads, and fails with it."""

    def stage(values, source, max_wer, *needs):
        folder = tmp_path / values / "filter"
        config = FilterConfig(source, folder, max_wer=max_wer)
        return SweepStage("filter", values, config, needs, folder.with_suffix(".json"))

    base = stage("base", store(tmp_path / "labels"), 60.0)
    six = stage("six", base.config.output_dir, 6.0, base.record)
    none = stage("none", base.config.output_dir, 0.0, base.record)
    last = stage("last", none.config.output_dir, 60.0, none.record)
    outcomes = {one.values: outcome for one, outcome in run_on_ray([base, six, none, last], 1)}
    kept = {name: outcome.result.get("labels") for name, outcome in outcomes.items()}
    assert kept == {"base": 5, "six": 3, "none": None, "last": None}
    assert outcomes["last"].error == outcomes["none"].error
    assert outcomes["none"].error.startswith("filter: none of 5 labels is kept")
    assert LabelStore(six.config.output_dir).complete()


def test_ray_that_is_not_installed_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"needs Ray: pip install 'flax-distil\[ray\]'"):
        start_engines(config, list, [])


def test_an_actor_takes_a_chip_a_gpu_or_a_machine():
    assert placement({"TPU": 8.0, "CPU": 96.0}, 2) == (8, {"resources": {"TPU": 1}})
    assert placement({"GPU": 4.0, "CPU": 16.0}, 1) == (4, {"num_gpus": 1})
    assert placement({"CPU": 16.0}, 3)[0] == 3


def test_hosts_share_the_shards_by_number(config, monkeypatch, tmp_path):
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    waits = []
    monkeypatch.setattr(labeller, "barrier", lambda name, timeout: waits.append(name))

    def files() -> list[str]:
        return sorted(path.stem for path in (config.output_dir / "data").glob("*.parquet"))

    one = fake_labeller(config)
    label(one.job, one.shards, host=1, hosts=2)
    assert files() == ["00001", "00003", "00005"]
    assert not (config.output_dir / "shards.json").exists()
    summary = label(one.job, one.shards, host=0, hosts=2)
    assert (summary.labels, len(waits)) == (21, 2)
    assert contents(config.output_dir) == contents(tmp_path / "whole")


def test_a_bucket_has_what_a_disk_has(config, tmp_path):
    bucket = Path(f"memory://{tmp_path.name}")
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    label_with(dataclasses.replace(config, output_dir=bucket))
    whole, store = contents(tmp_path / "whole"), LabelStore(bucket, {})
    assert len(whole) > 6
    assert {name: store.files.cat_file(name) for name in whole} == whole
    assert label_with(dataclasses.replace(config, output_dir=bucket)).labelled_now == 0
    with pytest.raises(InputError, match=r"memory://.* is a bucket: name the folder"):
        shard_files(bucket)
