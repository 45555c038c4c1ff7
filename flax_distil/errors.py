"""The exceptions that mean «your input, not our bug», and guards around files that raise them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


class Stopped(InputError):
    """A stage was asked to stop and saved what it did; the stages after it do not run.

    The command line exits with status 3.
    """

    status = 3


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: it is not there, or holds none.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there: is {path.parent} a Whisper model?")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path} is no JSON (nested too deeply): fetch it again") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: fetch it again")
    return content


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
