"""pip itself downloads, from a folder of wheels made here; no network."""

import multiprocessing
import zipfile

import pytest

from flax_distil.errors import InputError
from flax_distil.fetch.packages import Wheel, download, lock, sha256, unpack


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes for PyPI, with one wheel in it; and a fresh cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "tiny_parcel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_parcel/data/part1", "Hello, ")
        wheel.writestr("tiny_parcel/data/part2", "world")
        info = "tiny_parcel-1.0.dist-info/"
        wheel.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: tiny-parcel\nVersion: 1.0\n"
        )
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(info + "WHEEL", tags)
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


def test_downloaded_checked_and_put_together(shop, tmp_path):
    pinned = Wheel("tiny-parcel", "1.0", sha256(shop))
    kept = download(pinned)
    assert sha256(kept) == pinned.sha256
    shop.unlink()
    assert download(pinned) == kept  # the second time it is there

    members = ("tiny_parcel/data/part1", "tiny_parcel/data/part2")
    unpack([kept], {"whole.txt": members}, tmp_path)
    assert (tmp_path / "whole.txt").read_text() == "Hello, world"
    assert not (tmp_path / "tiny_parcel").exists()
    with pytest.raises(InputError, match="tiny_parcel/nothing, of which x is made"):
        unpack([kept], {"x": ("tiny_parcel/nothing",)}, tmp_path)


def test_another_file_than_pinned(shop, tmp_path):
    with pytest.raises(InputError, match=r"tiny-parcel 1\.0: .*DO NOT MATCH"):
        download(Wheel("tiny-parcel", "1.0", "0" * 64))
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_damaged_cache_is_fetched_again(shop):
    pinned = Wheel("tiny-parcel", "1.0", sha256(shop))
    kept = download(pinned)
    kept.write_bytes(b"half")
    assert sha256(download(pinned)) == pinned.sha256


def test_not_to_be_had(shop):
    with pytest.raises(InputError, match=r"missing-parcel 2\.0: ERROR.*try again"):
        download(Wheel("missing-parcel", "2.0", "0" * 64))


def test_no_cache_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="FLAX_DISTIL_CACHE"):
        lock("anything")


def hold(folder, started, release):
    import os

    os.environ["FLAX_DISTIL_CACHE"] = str(folder)
    with lock("one"):
        started.set()
        release.wait(30)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    from filelock import Timeout

    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    started, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, started, release))
    other.start()
    try:
        assert started.wait(60)
        with pytest.raises(Timeout):
            lock("one").acquire(timeout=0.1)
    finally:
        release.set()
        other.join(60)
    with lock("one"):
        assert other.exitcode == 0
