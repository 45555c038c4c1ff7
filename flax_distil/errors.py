"""Exceptions for wrong user input, and file checks that raise them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """The user's input or configuration is wrong; the message says how, and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """

    status = 2


class SomeFailed(InputError):
    """Some of many inputs failed and the others are done; the message lists the failed ones.

    The command line exits with status 1.
    """

    status = 1


class Stopped(InputError):
    """A stage was asked to stop and saved its work; later stages do not run.

    The command line exits with status 3.
    """

    status = 3


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing or does not hold a JSON object.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: is {path.parent} a Whisper model?")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not JSON with one object ({reason}): fetch it again") from None
    return content


def check_writable(folder: Path) -> None:
    """Raises InputError where `folder` cannot be written to or created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"cannot write to {existing}: choose another --output-dir")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns an OSError of writing into `folder`, as of a full disk, into an InputError.

    Raises:
        InputError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or folder
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
