"""Files under a full disk and after kills."""

import errno
import fcntl
import os

import pytest

from flax_distil.files import remove_partial, write_changed, write_whole


@pytest.fixture
def full(monkeypatch):
    """A disk without room for what is to reach it."""

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", refuse)


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, full):
    path = tmp_path / "recipe.toml"
    write_whole(path, b"old")
    full()
    with pytest.raises(OSError, match=r"No space left on device: .*recipe\.toml"):
        write_whole(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("recipe.toml", b"old")
    ]


def test_what_does_not_change_is_not_written(tmp_path, full):
    path = tmp_path / "versions.json"
    write_changed(path, "ä")
    full()
    write_changed(path, "ä")
    with pytest.raises(OSError, match="No space left"):
        write_changed(path, "b")


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(tmp_path):
    for name in (".a.host.1.partial", ".b.host.2.partial", "c.partial"):
        (tmp_path / name).write_bytes(b"half")
    with (tmp_path / ".b.host.2.partial").open("r+b") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.host.2.partial", "c.partial"]
