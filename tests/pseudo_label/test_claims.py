"""Processes that share a label store: no shard twice, none forgotten, whoever dies."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_teacher import fake_teacher, label_with
from test_labeller import contents

from flax_distil.errors import InputError
from flax_distil.pseudo_label.claims import Claims, alive, here, started
from flax_distil.pseudo_label.folder import Folder
from flax_distil.pseudo_label.store import LabelStore, shard_files

PROGRAM = str(Path(__file__).with_name("fake_teacher.py"))


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """Where labels go: a disk, or fsspec's memory in the place of a bucket."""
    return tmp_path / "labels" if request.param == "disk" else Path(f"memory://{tmp_path.name}")


def claim_of(folder: Path, shard: int, host: str, process: int) -> None:
    owner = json.dumps({"host": host, "process": process, "beat": 0})
    assert Folder(folder).create(f"claims/{shard:05d}.0", owner.encode())


def everything(folder: Path) -> dict[str, bytes]:
    """What labelling leaves; the order in which shards are listed is that of their numbers."""
    files = Folder(folder)
    assert not files.names("claims")
    names = [*files.names(), *(f"data/{name}" for name in files.names("data"))]
    return {name: files.read(name) for name in names if "." in name}


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


def test_a_bucket_has_what_a_disk_has(config, tmp_path):
    bucket = Path(f"memory://{tmp_path.name}")
    label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    label_with(dataclasses.replace(config, output_dir=bucket))
    assert len(everything(bucket)) > 6
    assert everything(bucket) == everything(tmp_path / "whole")
    assert label_with(dataclasses.replace(config, output_dir=bucket)).labelled_now == 0
    with pytest.raises(InputError, match=r"memory://.* is read where it is mounted"):
        shard_files(bucket)


def test_a_claim_of_a_dead_process_is_taken_over_at_once(config, tmp_path, place):
    whole = label_with(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    config = dataclasses.replace(config, output_dir=place)
    label_with(config)
    Folder(place).remove("data/00001.parquet")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    claim_of(place, 1, here(), ended.pid)
    begun = time.monotonic()
    assert label_with(config).labels == whole.labels
    assert time.monotonic() - begun < config.claim_patience / 10
    assert everything(place) == everything(tmp_path / "whole")


def test_a_silent_claim_of_another_host_is_taken_over_in_the_end(config, place):
    config = dataclasses.replace(config, claim_patience=0.5, output_dir=place)
    label_with(config)
    Folder(place).remove("data/00001.parquet")
    claim_of(place, 1, "elsewhere", 1)
    begun = time.monotonic()
    assert label_with(config).labels == 21
    assert time.monotonic() - begun > 0.5


def test_who_was_killed_while_claiming_is_not_waited_for(place, monkeypatch):
    monkeypatch.setattr("flax_distil.pseudo_label.claims.UNSIGNED", 0.1)
    assert Folder(place).create("claims/00003.0", b"")
    claims = Claims(Folder(place), patience=60)
    assert not claims.take(3)
    time.sleep(0.2)
    assert claims.take(3)


def test_a_claim_that_is_written_anew_stays(place):
    claim_of(place, 3, "elsewhere", 1)
    folder = Folder(place)
    claims = Claims(folder, patience=0.2)
    for beat in range(5):
        assert not claims.take(3)
        time.sleep(0.1)
        folder.write("claims/00003.0", json.dumps({"host": "elsewhere", "beat": beat}).encode())
    assert claims.refused == {3}
    assert claims.take(4)
    assert claims.held == {4: "claims/00004.0"}
    before = folder.read("claims/00004.0")
    claims.touch()
    assert folder.read("claims/00004.0") != before
    claims.done(4)
    assert folder.names("claims") == ["00003.0"]
    folder.remove("claims/00003.0")
    assert claims.wait()
    assert claims.take(3)


def test_one_of_those_who_see_an_owner_dead_takes_over(place, monkeypatch):
    """Both saw the same silent claim; the slower one finds the next number taken."""
    monkeypatch.setattr("flax_distil.pseudo_label.claims.alive", lambda *process: True)
    claim_of(place, 3, "elsewhere", 1)
    first, second = (Claims(Folder(place), patience=0.05) for _ in range(2))
    assert not first.take(3)
    assert not second.take(3)
    time.sleep(0.1)
    assert second._dead("00003.0")
    assert first.take(3)
    assert first.held == {3: "claims/00003.1"}
    assert not Folder(place).create("claims/00003.1", b"")
    assert not second.take(3)
    first.done(3)
    assert not Folder(place).names("claims")


RACER = """
import sys, time
from pathlib import Path
from flax_distil.pseudo_label.folder import Folder
folder = Folder(Path(sys.argv[1]))
while time.time() < float(sys.argv[2]):
    pass
print(sum(folder.create(f"claims/{n:05d}.0", sys.argv[3].encode()) for n in range(200)))
"""


def test_two_processes_that_create_at_once_never_both_succeed(tmp_path):
    begin = str(time.time() + 2)
    command = [sys.executable, "-c", RACER, str(tmp_path), begin]
    racers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == 200


def test_who_is_alive():
    parent = os.getppid()
    assert alive(parent)
    assert alive(parent, started(parent))
    assert not alive(parent, "1")  # an earlier one of the same number
    assert not alive(os.getpid())  # an earlier life of this one, by chance of the same number


def test_a_number_in_another_namespace_says_nothing(place):
    """A container on this machine, or another machine of the same name."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name, *rest = here().split()
    for other in (f"{name} {rest[0]} pid:[1]", f"{name} another-boot {rest[1]}", name):
        claim_of(place, 3, other, ended.pid)
        assert not Claims(Folder(place), patience=60).take(3)
        Folder(place).remove("claims/00003.0")
    claim_of(place, 3, here(), ended.pid)
    assert Claims(Folder(place), patience=60).take(3)


def test_a_shard_that_another_process_has_just_finished_is_not_made_again(
    config, monkeypatch, tmp_path
):
    """It is finished between the listing of what is done and the claim."""
    config = dataclasses.replace(config, batch_size=2, shard_size=4)
    label_with(config)
    finished = LabelStore.finished

    def all_but_one(self, *args, **kwargs):
        found = finished(self, *args, **kwargs)
        if not looked:
            del found[2]
        looked.append(len(found))
        return found

    looked, asked = [], []

    def teacher(waveforms, language):
        asked.append(len(waveforms))
        return fake_teacher(waveforms, language)

    monkeypatch.setattr(LabelStore, "finished", all_but_one)
    (config.output_dir / "shards.json").unlink()
    summary = label_with(config, teacher)
    assert looked == [5, 6]
    assert not asked
    assert (summary.labels, summary.labelled_now) == (21, 0)
