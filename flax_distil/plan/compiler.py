"""Compiling for chips that are not here: what a program needs, or why the compiler refuses it.

Answers are kept in the cache by the program's hash, so that the same question costs nothing twice.
"""

import gzip
import hashlib
import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from flax_distil.cache import cache_folder
from flax_distil.plan.hlo import Module, parse
from flax_distil.plan.topology import Slice, libtpu_version

log = logging.getLogger(__name__)

KERNEL = re.compile(r"\\22body\\22: \\22[A-Za-z0-9+/=]+")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Refusal:
    """A program that needs more memory than a chip has, in bytes, by the compiler's own count.

    needed: of its temporaries alone, where the compiler gave up early.
    """

    needed: float
    available: float


@dataclass(frozen=True)
class Compiled:
    """What a program takes on one chip, in bytes, and its compiled text.

    kept: of the results, those that do not overwrite an argument.
    seconds: that compiling took, when it was compiled.
    """

    arguments: int
    temporaries: int
    kept: int
    code: int
    seconds: float
    text: str = field(repr=False)

    @property
    def memory(self) -> int:
        """Arguments, temporaries and results at once: cautious, for the peak may be lower."""
        return self.arguments + self.temporaries + self.kept

    @cached_property
    def module(self) -> Module:
        """The program, instruction by instruction."""
        return parse(self.text)


def compiled(lowered: Any, target: Slice) -> Compiled | Refusal:
    """The compiler's answer to a program, from the cache where it was asked before."""
    path = cache_folder() / "plans" / f"{program_hash(lowered, target)}.json.gz"
    if not path.is_file():
        answer = ask(lowered)
        keep(answer, path)
    kept = json.loads(gzip.decompress(path.read_bytes()))
    return Refusal(**kept) if "needed" in kept else Compiled(**kept)


def program_hash(lowered: Any, target: Slice) -> str:
    """Of everything that decides the compiler's answer, and the same on every machine.

    The code of kernels is left out, which holds paths of the machine: JAX's version and the sizes
    of their blocks stand for it.
    """
    compilers = (version("jax"), version("jaxlib"), libtpu_version(), target.name)
    text = "\n".join(map(str, (*compilers, KERNEL.sub("", lowered.as_text()))))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def ask(lowered: Any) -> Compiled | Refusal:
    """Compiles. Only want of HBM is an answer; other errors of the compiler are raised."""
    start = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
        return refused
    memory = program.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        kept=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=round(time.monotonic() - start, 1),
        text=program.as_text(),
    )


def refusal(message: str) -> Refusal | None:
    """The compiler's complaint about HBM, read: it has one for early on and one for the end."""
    patterns = (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            needed, unit, available, other = found.groups()
            return Refusal(float(needed) * UNITS[unit], float(available) * UNITS[other])
    return None


def keep(answer: Compiled | Refusal, path: Path) -> None:
    """Writes an answer whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{time.monotonic_ns()}")
    part.write_bytes(gzip.compress(json.dumps(asdict(answer)).encode()))
    part.replace(path)
