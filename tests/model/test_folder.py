"""A kill at any moment leaves the old model, the new one, or none: never parts of both."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint, replacing, save_checkpoint


@pytest.fixture
def written(tmp_path):
    """A folder with an old model of three files, and a file of somebody else's."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "weights", "weights-1", "notes"):
        (folder / name).write_text(f"old {name}")
    return folder


def write(folder):
    with replacing(folder, "config.json", ("weights-*",)) as complete:
        for name in ("config.json", "weights"):
            (complete / name).write_text(f"new {name}")


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def fail(monkeypatch, step, kind=OSError):
    """Removing or renaming fails from the call number `step` on; returns what was called."""
    called = []

    def stopping(real):
        def call(path, *arguments, **options):
            called.append(path)
            if len(called) > step:
                raise kind("stopped")
            return real(path, *arguments, **options)

        return call

    for name in ("unlink", "replace", "rename"):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))
    return called


def test_the_new_files_replace_the_old_ones_and_others_stay(written):
    write(written)
    new = {"config.json": "new config.json", "weights": "new weights", "notes": "old notes"}
    assert contents(written) == new
    assert [file.name for file in written.parent.iterdir()] == ["model"]
    write(written.parent / "other")
    assert set(contents(written.parent / "other")) == {"config.json", "weights"}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failed_step_leaves_the_old_model_or_none(written, monkeypatch, kind):
    before, steps = contents(written), 4  # the key and what is outdated go, two files come
    for step in range(steps):
        with monkeypatch.context() as patch:
            fail(patch, step, kind)
            with pytest.raises(InputError if kind is OSError else kind, match="stopped"):
                write(written)
        assert contents(written) == before if step == 0 else "config.json" not in contents(written)
        assert [file.name for file in written.parent.iterdir()] == ["model"]
        for name, text in before.items():
            (written / name).write_text(text)
    with monkeypatch.context() as patch:
        assert len(fail(patch, steps)) == 0
        write(written)
    assert contents(written)["config.json"] == "new config.json"


def test_a_checkpoint_is_old_or_new_or_refused(random_folders, tmp_path, monkeypatch):
    """The same sizes, so that old weights would load beside a new configuration."""
    old = load_checkpoint(random_folders[1])
    changed = jax.tree.map(lambda leaf: leaf + 1, old.params)
    new = replace(old, params=changed, config=old.config | {"mark": "new"})
    for step in range(14):
        folder = tmp_path / str(step)
        save_checkpoint(old, folder)
        with monkeypatch.context() as patch:
            called = fail(patch, step)
            with suppress(InputError):
                save_checkpoint(new, folder)
            assert step >= 12 or len(called) > step
        if not (folder / "config.json").is_file():
            with pytest.raises(InputError, match=r"config\.json is missing"):
                load_checkpoint(folder)
        else:
            found = load_checkpoint(folder)
            marked = json.loads((folder / "config.json").read_text()).get("mark") == "new"
            wanted = (changed if marked else old.params)["encoder"]["norm"]["scale"]
            np.testing.assert_array_equal(found.params["encoder"]["norm"]["scale"], wanted)
