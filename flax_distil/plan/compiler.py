"""Compiles for chips that are not present, and reads what a program needs.

Answers are cached by the program's fingerprint.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from pydantic import TypeAdapter

from flax_distil.cache import cache_folder, compile_aside
from flax_distil.files import write_whole
from flax_distil.plan.hlo import COUNTING, Collective, Held, parse
from flax_distil.plan.topology import Slice, libtpu_version

log = logging.getLogger(__name__)

KERNEL = re.compile(r"\\22body\\22: \\22[A-Za-z0-9+/=]+")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """One program, lowered and not yet compiled.

    name: train, encode or decode. clips: of one run, over all chips. rows: clips that a chip
    computes at a time. length: tokens of a clip. flops: useful ones of one run, over all chips.
    arguments: bytes a chip of each group. options: the compiler's, which `lowered` holds.
    loops: rounds of the loop whose end depends on the data, over the tokens of a text or, where
    every label is as long as it may be, over the vocabulary's chunks.
    """

    name: str
    clips: int
    rows: int
    length: int
    flops: float | int
    arguments: dict[str, float]
    lowered: Any
    loops: int = 1
    options: Mapping[str, str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A program that needs more memory than a chip has, in bytes, by the compiler's own count.

    needed: of its temporaries alone, where the compiler gave up early.
    """

    needed: float
    available: float
    source: str = ""


@dataclass(frozen=True)
class Compiled:
    """What a program takes on one chip; bytes, of one run.

    kept: of the results, those that do not overwrite an argument. traffic: through HBM.
    cycles: of the chip's, that the compiler expects, without kernels and transfers.
    host_transfers: names of instructions that wait for the host. tensors: the largest in HBM.
    seconds: that compiling took. source: where the answer comes from.
    """

    arguments: int
    temporaries: int
    kept: int
    code: int
    traffic: float | int
    cycles: float | int
    collectives: tuple[Collective, ...]
    host_transfers: tuple[str, ...]
    tensors: tuple[Held, ...]
    seconds: float
    source: str = ""

    @property
    def memory(self) -> int:
        """Arguments, temporaries and results at once: cautious, for the peak may be lower."""
        return self.arguments + self.temporaries + self.kept


ANSWER: TypeAdapter[Compiled | Refusal] = TypeAdapter(Compiled | Refusal)  # as a file holds it


def compiled(program: Program, target: Slice, answers: Path | None = None) -> Compiled | Refusal:
    """The compiler's answer to a program, from `answers` or the cache if it has one."""
    name = fingerprint(program, target)
    kept = cache_folder() / "plans" / f"{name}.json"
    for path in [*(sorted(answers.glob("*.json")) if answers else ()), kept]:
        if path.is_file() and (found := json.loads(path.read_text()))["fingerprint"] == name:
            source = "the cache" if path == kept else f"{answers}"
            return replace(ANSWER.validate_python(found["answer"]), source=source)
    log.info("compiling %s for %s", program.name, target.name)
    answer = ask(program)
    write_answer(answer, name, kept)
    return replace(answer, source="computed now")


def fingerprint(program: Program, target: Slice) -> str:
    """A hash of everything that the compiler's answer depends on, the same on every machine.

    The code of kernels is left out, because it contains paths of the machine; JAX's version and
    the sizes of their blocks identify it.
    """
    compilers = (version("jax"), version("jaxlib"), libtpu_version(), COUNTING)
    options = (f"{name}={value}" for name, value in sorted(program.options.items()))
    text = KERNEL.sub("", program.lowered.as_text())
    text = "\n".join(map(str, (*compilers, target.name, program.loops, *options, text)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def ask(program: Program) -> Compiled | Refusal:
    """Compile; a lack of HBM is a `Refusal`, other errors are raised."""
    start = time.monotonic()
    try:
        executable = compile_aside(program.lowered)
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(str(error))
        if refused is None:
            raise
        return refused
    memory, module = executable.memory_analysis(), parse(executable.as_text())
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        kept=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=module.traffic(program.loops),
        cycles=module.cycles(program.loops),
        collectives=tuple(module.collectives(program.loops)),
        host_transfers=tuple(one.name for one in module.host_transfers()),
        tensors=module.largest(8),
        seconds=round(time.monotonic() - start, 1),
    )


def refusal(message: str) -> Refusal | None:
    """The sizes in a compiler's error about HBM, of which it has two; None for other errors."""
    patterns = (
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    )
    for pattern in patterns:
        if found := re.search(pattern, message):
            needed, unit, available, other = found.groups()
            return Refusal(float(needed) * UNITS[unit], float(available) * UNITS[other])
    return None


def write_answer(answer: Compiled | Refusal, name: str, path: Path, **more: Any) -> None:
    """Write an answer, its fingerprint and `more` to a file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {**more, "fingerprint": name, "answer": asdict(answer)}
    write_whole(path, (json.dumps(contents, indent=1) + "\n").encode())
