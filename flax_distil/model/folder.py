"""A model's folder is replaced whole, or stays what it was."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flax_distil.errors import InputError


@contextmanager
def replacing(folder: Path, key: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write a model into, whose files then replace those in `folder`.

    It lies beside `folder` until it is complete. Then `key`, the file without which no program
    takes the folder for a model, goes first and comes last: whoever reads in between, or after a
    kill, finds no model, never new weights beside an old configuration. When a step fails, the old
    files are put back. Other files in `folder` stay, but for those that match `stale`.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = folder.resolve()
    fate = "nothing has changed"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        complete, old = beside / "new", beside / "old"
        try:
            complete.mkdir()
            yield complete
            if folder.exists():
                old.mkdir()
                _exchange(complete, folder, old, key, stale)
                shutil.rmtree(old)
            else:
                os.rename(complete, folder)
        finally:
            if old.is_dir() and any(old.iterdir()):  # they could not be put back
                fate = f"its old content is in {old}"
            else:
                shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} could not be written, {fate}: {error}") from error


def _exchange(complete: Path, folder: Path, old: Path, key: str, stale: Sequence[str]) -> None:
    """Move the files of `complete` into `folder`, and those that they replace into `old`."""
    names = sorted((file.name for file in complete.iterdir()), key=lambda name: name == key)
    leaving = {key, *names, *(file.name for glob in stale for file in folder.glob(glob))}
    arrived: list[str] = []
    try:
        for name in sorted(leaving, key=lambda name: name != key):
            if (folder / name).exists():
                os.replace(folder / name, old / name)
        for name in names:
            os.replace(complete / name, folder / name)
            arrived.append(name)
    except BaseException:
        for name in reversed(arrived):
            os.replace(folder / name, complete / name)
        for file in sorted(old.iterdir(), key=lambda file: file.name == key):
            os.replace(file, folder / file.name)
        raise
