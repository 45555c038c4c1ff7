"""Who makes which shard, where several processes label into one store.

    claims/00003.0      made by whoever makes shard 3; gone when the shard is there
    claims/00003.1      made by who found that one dead

A claim is a file that one process alone can create, which disks and buckets both promise. Its owner
writes it anew while it works; one that stayed the same for `patience` seconds belongs to a process
that died, and whoever creates the next number has its shard. Nobody's clock is compared with
another's: each waits by its own. Should an owner only have been slow, both make the same shard,
byte for byte, and the second puts it over the first.

Whether an owner's process still runs can be asked only where its number means the same as here: on
the same machine since it was started (two may have the same name), in the same PID namespace (each
container has its own).
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from flax_distil.pseudo_label.folder import Folder

UNSIGNED = 5.0  # seconds that a claim may be without its owner's name


@dataclass
class Claims:
    """The claims of one process. patience: seconds without a sign after which an owner is dead."""

    folder: Folder
    patience: float = 300.0
    held: dict[int, str] = field(default_factory=dict)
    """The file of each shard that is ours."""
    seen: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    """Others' claims: what they said last, and since when, by our clock, they say so."""
    refused: set[int] = field(default_factory=set)
    """Shards that others had when we asked, since we last waited."""
    beats: int = 0
    last_beat: float = -1e9

    def take(self, shard: int) -> bool:
        """Whether this process may make the shard now."""
        newest = self._newest(shard)
        if newest is None or self._dead(newest):
            number = 0 if newest is None else int(newest.partition(".")[2]) + 1
            name = f"claims/{shard:05d}.{number}"
            if self.folder.create(name, self._sign()):
                self.held[shard] = name
                return True
        self.refused.add(shard)
        return False

    def touch(self) -> None:
        """Say that this process is alive, at most ten times within `patience`: buckets count."""
        if time.monotonic() - self.last_beat < self.patience / 10:
            return
        self.last_beat, self.beats = time.monotonic(), self.beats + 1
        for name in self.held.values():
            self.folder.write(name, self._sign())

    def done(self, shard: int) -> None:
        """Give a claim back: the shard is there. Those of dead owners before us go with it."""
        self.held.pop(shard, None)
        for name in self._of(shard):
            self.folder.remove(f"claims/{name}")

    def wait(self) -> bool:
        """Until one of the shards that were refused is free; False where none was, at once."""
        refused, self.refused = self.refused, set()
        while refused and not any(self._free(shard) for shard in refused):
            time.sleep(min(2.0, self.patience / 4))
        return bool(refused)

    def clear(self) -> None:
        """Remove the folder once every shard is there, with what killed processes left in it."""
        for name in self.folder.names("claims"):
            if name[0].isdigit():
                self.folder.remove(f"claims/{name}")
        if not self.folder.local:
            return
        claims = self.folder.path / "claims"
        with suppress(OSError):
            for left in claims.glob(".*"):
                left.unlink(missing_ok=True)
            claims.rmdir()

    def _of(self, shard: int) -> list[str]:
        return [name for name in self.folder.names("claims") if name.startswith(f"{shard:05d}.")]

    def _newest(self, shard: int) -> str | None:
        return max(self._of(shard), key=lambda name: int(name.partition(".")[2]), default=None)

    def _free(self, shard: int) -> bool:
        newest = self._newest(shard)
        return newest is None or self._dead(newest)

    def _sign(self) -> bytes:
        process = os.getpid()
        owner = {"host": here(), "process": process, "started": started(process)}
        return json.dumps(owner | {"beat": self.beats}).encode()

    def _dead(self, name: str) -> bool:
        """Whether the owner of a claim is known or presumed to be dead."""
        try:
            said = self.folder.read(f"claims/{name}")
        except FileNotFoundError:
            return True  # given back just now
        patience = self.patience
        try:
            owner = json.loads(said)
        except ValueError:  # read while it was written, or killed while it wrote
            patience = min(patience, UNSIGNED)
        else:
            known = owner["host"] == here()
            if known and not alive(owner["process"], owner.get("started")):
                return True
        if self.seen.get(name, (None,))[0] != said:
            self.seen[name] = (said, time.monotonic())
        return time.monotonic() - self.seen[name][1] > patience


@cache
def here() -> str:
    """Where process numbers mean the same: this machine, since its start, in this namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not on every system
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(process: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where that is not known."""
    try:
        # Behind the name, which may hold spaces and brackets, it is the 20th field (man proc).
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def alive(process: int, since: str | None = None) -> bool:
    """Whether another process of this number runs here, started at `since` where that is known;
    our own number is an earlier process's, who died."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return None in (since, now := started(process)) or since == now
