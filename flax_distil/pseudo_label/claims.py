"""Who makes which shard, where several processes label into one store on a shared folder.

    claims/00003        made by whoever makes shard 3; gone when the shard is there

A claim is a file that only one process can create. Its owner touches it while it works; one that
was not touched for `patience` seconds belongs to a process that died, and is taken over. Nobody's
clock is compared with another's: each waits by its own. Should an owner only have been slow, both
make the same shard, byte for byte, and the second puts it over the first.

It needs a file system with atomic links and renames, as NFS and Filestore have them; a bucket has
no links.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Claims:
    """The claims of one process. patience: seconds without a touch after which an owner is dead."""

    folder: Path
    patience: float = 300.0
    held: set[int] = field(default_factory=set)
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Others' claims: when they were touched last, and since when, by our clock, they are so."""
    refused: set[int] = field(default_factory=set)
    """Shards that others had when we asked, since we last waited."""

    def take(self, shard: int) -> bool:
        """Whether this process may make the shard now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._create(shard):
            return True
        if not self._dead(shard):
            self.refused.add(shard)
            return False
        # Of those that see the claim die, one can move it away, and only then is there room.
        aside = self._path(shard).with_name(f".{shard:05d}.{socket.gethostname()}.{os.getpid()}")
        with suppress(FileNotFoundError):
            self._path(shard).rename(aside)
            aside.unlink()
        if self._create(shard):
            return True
        self.refused.add(shard)
        return False

    def touch(self) -> None:
        """Say that this process is alive."""
        for shard in self.held:
            with suppress(FileNotFoundError):
                os.utime(self._path(shard))

    def done(self, shard: int) -> None:
        """Give a claim back: the shard is there."""
        self.held.discard(shard)
        self._path(shard).unlink(missing_ok=True)

    def wait(self) -> bool:
        """Until one of the shards that were refused is free; False where none was, at once."""
        refused, self.refused = self.refused, set()
        while refused and not any(self._dead(shard) for shard in refused):
            time.sleep(min(2.0, self.patience / 4))
        return bool(refused)

    def clear(self) -> None:
        """Remove the folder once nothing is claimed, and what killed processes left in it."""
        with suppress(OSError):
            for left in self.folder.glob(".*"):
                left.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}"

    def _create(self, shard: int) -> bool:
        """Whether there was no claim; a new one names its owner from the first moment."""
        named = self.folder / f".{socket.gethostname()}.{os.getpid()}"
        owner = {"host": socket.gethostname(), "process": os.getpid()}
        named.write_text(json.dumps(owner), encoding="utf-8")
        try:
            os.link(named, self._path(shard))
        except FileExistsError:
            return False
        finally:
            named.unlink()
        self.held.add(shard)
        self.seen.pop(shard, None)
        return True

    def _dead(self, shard: int) -> bool:
        """Whether the owner of a claim is known or presumed to be dead."""
        try:
            touched = self._path(shard).stat().st_mtime_ns
            owner = json.loads(self._path(shard).read_bytes())
        except FileNotFoundError:
            return True  # given back just now
        if owner["host"] == socket.gethostname() and not alive(owner["process"]):
            return True
        if self.seen.get(shard, (None,))[0] != touched:
            self.seen[shard] = (touched, time.monotonic())
        return time.monotonic() - self.seen[shard][1] > self.patience


def alive(process: int) -> bool:
    """Whether another process of this number runs on this machine; our own number is an earlier
    process's, who died."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
