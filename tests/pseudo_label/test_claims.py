"""Processes that share a label store: no shard twice, none forgotten, whoever dies."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fake_teacher import fake_teacher, label_with
from test_labeller import contents

from flax_distil.pseudo_label.claims import Claims, alive

PROGRAM = str(Path(__file__).with_name("fake_teacher.py"))


def claim_of(folder: Path, shard: int, host: str, process: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{shard:05d}").write_text(json.dumps({"host": host, "process": process}))


def test_two_processes_share_the_shards(config, speech, tmp_path):
    """One begins, the other joins and works while the first one waits; both end when all is done,
    and the store is that of one."""
    config = dataclasses.replace(config, batch_size=2, shard_size=1)
    whole = label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    folder, joined = config.output_dir / "data", []

    def patient(waveforms, language):
        if not joined:
            command = [sys.executable, PROGRAM, str(speech / "manifest.jsonl")]
            joined.append(subprocess.Popen([*command, str(config.output_dir), "0"]))
            until = time.monotonic() + 60
            while len(list(folder.glob("[0-9]*"))) < 3 and time.monotonic() < until:
                time.sleep(0.02)
        return fake_teacher(waveforms, language)

    summary = label_with(config, patient)
    assert joined[0].wait(60) == 0
    assert 0 < summary.labelled_now < whole.labelled_now
    assert (summary.labels, summary.seconds) == (whole.labels, whole.seconds)
    assert contents(config.output_dir) == contents(tmp_path / "whole")


def test_a_claim_of_a_dead_process_is_taken_over_at_once(config, tmp_path):
    whole = label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    label_with(config)
    (config.output_dir / "data" / "00001.parquet").unlink()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim_of(config.output_dir / "claims", 1, os.uname().nodename, ended.pid)
    begun = time.monotonic()
    assert label_with(config).labels == whole.labels
    assert time.monotonic() - begun < config.claim_patience / 10
    assert contents(config.output_dir) == contents(tmp_path / "whole")


def test_a_silent_claim_of_another_host_is_taken_over_in_the_end(config):
    config = dataclasses.replace(config, claim_patience=0.5)
    label_with(config)
    (config.output_dir / "data" / "00001.parquet").unlink()
    claim_of(config.output_dir / "claims", 1, "elsewhere", 1)
    begun = time.monotonic()
    assert label_with(config).labels == 21
    assert time.monotonic() - begun > 0.5


def test_a_claim_that_is_touched_stays(tmp_path):
    claim_of(tmp_path, 3, "elsewhere", 1)
    claims = Claims(tmp_path, patience=0.2)
    for _ in range(5):
        assert not claims.take(3)
        time.sleep(0.1)
        os.utime(tmp_path / "00003")
    assert claims.refused == {3}
    assert claims.take(4)
    assert claims.held == {4}
    claims.done(4)
    assert [path.name for path in tmp_path.iterdir()] == ["00003"]
    (tmp_path / "00003").unlink()
    assert claims.wait()
    assert claims.take(3)


def test_who_is_alive():
    assert alive(os.getppid())
    assert not alive(os.getpid())  # an earlier life of this one, by chance of the same number
