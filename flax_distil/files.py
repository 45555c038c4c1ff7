"""Files that are there whole or not at all, whatever is killed and however full the disk is."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, contents: bytes) -> None:
    """Write, reach the disk, then rename: a kill leaves the old file, or none, or the whole one.

    Raises OSError that names `path`, which is then as it was.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:  # a full disk has no room for what is of no use
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_changed(path: Path, text: str) -> None:
    """As `write_whole`, where the file does not hold this text already."""
    contents = text.encode()
    if not path.is_file() or path.read_bytes() != contents:
        write_whole(path, contents)


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left; a file that is being written is locked and stays."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
