"""A folder that processes share: on a disk, or in a bucket (`gs://…`) through fsspec.

It promises little, so that a bucket can keep it: a file is there whole or not at all, and of those
who create the same file one succeeds.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flax_distil.errors import InputError
from flax_distil.files import write_whole


@dataclass(frozen=True)
class Folder:
    """The files under one path; their names may hold slashes."""

    path: Path

    @property
    def address(self) -> str:
        """The path, or the URL of which a `Path` has kept one slash: `gs:/bucket/labels`."""
        return re.sub(r"^([a-z][a-z0-9]+):/+", r"\1://", str(self.path))

    @property
    def local(self) -> bool:
        """Whether it is on a disk."""
        return "://" not in self.address

    def read(self, name: str, start: int = 0) -> bytes:
        """A file's contents from byte `start` on. Raises FileNotFoundError."""
        return self._system.cat_file(self._at(name), start=start)

    def size(self, name: str) -> int:
        """A file's bytes. Raises FileNotFoundError."""
        self._system.invalidate_cache()
        return self._system.size(self._at(name))

    def write(self, name: str, contents: bytes) -> None:
        """Put a whole file in its place, over an older one."""
        if self.local:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / name, contents)
        else:  # an upload is seen when it is complete
            self._system.pipe_file(self._at(name), contents)

    def create(self, name: str, contents: bytes) -> bool:
        """Whether the file was not there; it is now, by us alone.

        On a disk it is empty for a moment. Buckets are asked to refuse where one is there.
        """
        try:
            if not self.local:
                self._system.pipe_file(self._at(name), contents, mode="create")
                return True
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            with (self.path / name).open("xb") as file:
                file.write(contents)
        except FileExistsError:
            return False
        except FileNotFoundError:  # somebody has just removed the folder
            return self.create(name, contents)
        return True

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        try:
            self._system.rm_file(self._at(name))
        except FileNotFoundError:
            return

    def names(self, inner: str = "") -> list[str]:
        """The files right in it, or in a folder inside, by their last names; hidden ones too."""
        return sorted(self.sizes(inner))

    def sizes(self, inner: str = "") -> dict[str, int]:
        """Bytes of what `names` gives."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._at(inner), detail=True)
        except FileNotFoundError:
            return {}
        named = ((one["name"].rstrip("/").rpartition("/")[2], one["size"]) for one in found)
        return {name: size for name, size in named if name}

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        inner, _, last = name.rpartition("/")
        return last in self.names(inner)

    @cached_property
    def _system(self) -> Any:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.address)[0]
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{self.address} cannot be reached ({error}): buckets need "
                "pip install 'flax-distil[tpu]', or a folder where the bucket is mounted"
            ) from None

    def _at(self, name: str) -> str:
        root = str(self.path.absolute()) if self.local else self.address.rstrip("/")
        return f"{root}/{name}" if name else root
