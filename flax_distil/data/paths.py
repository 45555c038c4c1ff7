"""Files on disk and, by URL, in buckets and on the hub (gs://, s3://, hf://), through fsspec."""

import glob
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.compression import compr
from fsspec.utils import infer_compression

from flax_distil.errors import InputError

PATTERN = re.compile(r"[*?[]|\{\d+\.\.\d+\}")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def address(source: str) -> str:
    """The path or URL that a source names; `Path` keeps one slash of `gs://bucket`."""
    source = os.path.expanduser(re.sub(r"^([a-z][a-z0-9]+):/+", r"\1://", source))
    if not is_url(source):
        return source
    files = file_system(source)
    return files.unstrip_protocol(files._strip_protocol(source))  # as the file system writes it


def is_url(path: str) -> bool:
    """Whether a path is a URL, which fsspec opens."""
    return "://" in path


def file_system(url: str) -> Any:
    """fsspec's file system of a URL. Raises InputError where its package is not installed."""
    try:
        return fsspec.url_to_fs(url)[0]
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {url} ({error}): install the file system of the bucket (gcsfs for gs://, "
            "s3fs for s3://), or name a folder where it is mounted"
        ) from None


def is_file(path: str) -> bool:
    """Whether a path or URL is a file."""
    return file_system(path).isfile(path) if is_url(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether a path or URL is a folder."""
    return file_system(path).isdir(path) if is_url(path) else os.path.isdir(path)


def open_file(path: str) -> Any:
    """A binary file that is open for reading: Python's, or of fsspec."""
    return file_system(path).open(path, "rb") if is_url(path) else open(path, "rb")


def read_file(path: str) -> bytes:
    """The contents of a file, decompressed where its suffix says so."""
    decompressed: Any = compr[infer_compression(path)]  # type: ignore[index]
    with open_file(path) as file:
        return decompressed(file, mode="rb").read()


def read_part(path: str, start: int, size: int) -> bytes:
    """A part of a file, of a URL by one request."""
    if is_url(path):
        return file_system(path).cat_file(path, start, start + size)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def join(folder: str, name: str) -> str:
    """The path of a name in a folder; absolute names and URLs are what they are."""
    if is_url(name) or os.path.isabs(name) or not is_url(folder):
        return name if is_url(name) else os.path.join(folder, name)
    protocol, _, path = folder.partition("://")
    return f"{protocol}://{os.path.normpath(os.path.join(path, name))}"


def absolute(path: str) -> str:
    """The path from the root, the same for every way of writing it."""
    return path if is_url(path) else os.path.abspath(path)


def relative(path: str, root: str) -> str | None:
    """The path below `root`; None where it is elsewhere."""
    path, root = absolute(path), absolute(root).rstrip("/") + "/"
    return path[len(root) :] if path.startswith(root) else None


def list_files(folder: str) -> list[str]:
    """All files below a folder, through links too, without those that systems hide there."""
    files = _remote(file_system(folder).find(folder), folder) if is_url(folder) else _walk(folder)
    return sorted(files, key=lambda path: path.split("/"))


def _walk(folder: str) -> Iterator[str]:
    entered = {os.path.realpath(folder)}

    def failed(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None

    for path, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        folders[:] = [
            name
            for name in folders
            if not _is_hidden(name)
            and (real := os.path.realpath(os.path.join(path, name))) not in entered
            and not entered.add(real)
        ]
        yield from (os.path.join(path, name) for name in files if not name.startswith("._"))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _remote(names: list[str], folder: str) -> Iterator[str]:
    """The URLs of names that a file system listed below a folder."""
    for name in names:
        url = file_system(folder).unstrip_protocol(name)
        if not any(map(_is_hidden, (relative(url, folder) or url).split("/")[:-1])):
            yield url


def matching(pattern: str) -> tuple[list[str], str]:
    """The files that match a pattern, and the folder that they are below.

    Beside *, ? and [], `{000..012}` stands for numbers. Existing folders are taken literally.
    """
    root = os.path.dirname(pattern)
    while root and (PATTERN.search(root) if is_url(root) else not os.path.isdir(root)):
        root = os.path.dirname(root)
    files = []
    for one in _numbered(pattern):
        if is_url(one):
            files += _remote(file_system(one).glob(one), root)
        else:
            names = glob.glob(one[len(root) :].lstrip("/"), root_dir=root or None, recursive=True)
            files += filter(os.path.isfile, (os.path.join(root, name) for name in names))
    return sorted(files), root


def _numbered(pattern: str) -> list[str]:
    """A pattern for every number of `{000..012}`."""
    if (match := RANGE.search(pattern)) is None:
        return [pattern]
    before, after, (first, last) = pattern[: match.start()], pattern[match.end() :], match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [one for number in numbers for one in _numbered(before + number + after)]
