"""The exceptions that mean «your input, not our bug»."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """The user's input or configuration is wrong; the message says what, and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """

    status = 2


class SomeFailed(InputError):
    """Some of many inputs could not be used, the others are done; the message lists the failed.

    The command line exits with status 1.
    """

    status = 1


def check_writable(folder: Path) -> None:
    """Raises InputError where `folder` is none that can be written to, nor can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"{there} is no folder that can be written to: give --output-dir another")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes into `folder`, whose disk may be full.

    Raises:
        InputError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        named = error.filename or folder
        raise InputError(f"{named} cannot be written: {error.strerror or error}") from error
