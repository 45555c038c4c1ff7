"""Atomic writing of files: complete or absent after a kill or on a full disk."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file atomically: to a temporary file, synced, then renamed.

    Raises:
        OSError: writing failed; `path` is unchanged.
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
    except OSError as error:  # free the space on a full disk
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_changed(path: Path, text: str) -> None:
    """As `write_whole`, unless the file already holds this text."""
    contents = text.encode()
    if not path.is_file() or path.read_bytes() != contents:
        write_whole(path, contents)


def remove_partial(folder: Path) -> None:
    """Remove temporary files of killed writers; files being written are locked and stay."""
    for path in folder.glob(".*.partial"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
