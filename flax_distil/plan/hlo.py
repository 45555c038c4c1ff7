"""What a compiled TPU program does, read from its HLO text: HBM traffic, collectives, transfers.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as
it runs. Buffers that the compiler placed in on-chip memory, such as `S(1)` in their layout, are not
traffic.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2,
    "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
    "c64": 8,
}  # fmt: skip
COUNTING = 3  # to be raised with a change of what is counted: cached answers are computed anew
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
PRODUCTS = ("convolution", "dot")
ON_CHIP = ("S(1)", "S(3)", "S(6)")  # vector memory, v4's common memory, scalar memory
NAMES = r"AllocateBuffer|ConcatBitcast"  # custom calls that only name memory
HOST = ("infeed", "outfeed", "send", "recv")
# No work of their own: names for buffers, and loops and branches, whose bodies are counted.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
    "conditional", "call", "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip
CALLING = {"call", "conditional", "async-start"}

_CALLED = re.compile(
    r"\b(?:calls|to_apply|(?:true|false)_computation|branch_computations)=(\{[^}]*\}|[^\s,]+)"
)
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # a kernel's metadata may begin so
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """One array of an instruction's result. on_chip: it lies in on-chip memory, not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    bytes: float
    on_chip: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def find(self, pattern: str) -> str:
        """The first group of a pattern in its attributes, or an empty string."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def called(self, role: str) -> str:
        """The computation it names as `calls`, `body`, `condition`, …"""
        return self.find(rf"\b{role}=%?([\w.\-]+)")

    @property
    def number(self) -> int:
        """The number of a parameter, or the value of an integer constant."""
        return int(self.find(r"^(\d+)\)"))

    @property
    def channel(self) -> str:
        """The channel of a collective, the same in all of its parts."""
        return self.find(r"\bchannel_id=(\d+)")

    @property
    def in_hbm(self) -> float | int:
        """Bytes of the result in HBM."""
        return sum(array.bytes for array in self.result if not array.on_chip)


Computation = Mapping[str, Instruction]  # by name


class Collective(NamedTuple):
    """Collectives of one kind and type. bytes: of the results of all of them, in one run.

    overlapped: bytes of those that are sent while matrices are multiplied.
    """

    kind: str
    dtype: str
    times: float
    bytes: float
    overlapped: float = 0.0


class Held(NamedTuple):
    """An array in HBM. where: the traced line that made it."""

    bytes: float
    dtype: str
    shape: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Module:
    """A compiled program: computations by name, each its instructions by name."""

    computations: Mapping[str, Computation]
    entry: str

    def runs(self, unknown: int = 1, fused: bool = False) -> dict[str, int]:
        """How often each computation runs. fused: also those of fusions.

        unknown: rounds of loops whose end depends on data, such as a decoder's.
        """
        times: dict[str, int] = defaultdict(int)
        calling = CALLING | {"fusion"} if fused else CALLING

        def visit(name: str, factor: int) -> None:
            times[name] += factor
            for one in self.computations[name].values():
                if one.opcode == "while":
                    rounds = self.rounds(one)
                    for role in ("body", "condition"):
                        visit(one.called(role), factor * (unknown if rounds is None else rounds))
                elif one.opcode in calling:
                    for names in _CALLED.findall(one.attributes):
                        for inner in re.findall(r"[\w.\-]+", names):
                            visit(inner, factor)

        visit(self.entry, 1)
        return dict(times)

    def rounds(self, loop: Instruction) -> int | None:
        """Rounds of a loop that counts from 0 to a constant, else None."""
        condition = self.computations[loop.called("condition")]
        root = next(one for one in condition.values() if one.root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = condition.get(root.operands[1])
        return limit.number if limit and limit.opcode == "constant" else None

    def executed(self, unknown: int = 1) -> Iterator[tuple[int, Instruction, Computation]]:
        """(number of runs, instruction, its computation) of each instruction outside of fusions."""
        for name, times in self.runs(unknown).items():
            for one in self.computations[name].values():
                yield times, one, self.computations[name]

    def traffic(self, unknown: int = 1) -> float | int:
        """Bytes read from and written to HBM in one run."""
        return sum(
            times * self._moved(one, computation)
            for times, one, computation in self.executed(unknown)
        )

    def cycles(self, unknown: int = 1) -> float | int:
        """Cycles of one run as estimated by the compiler, without kernels and transfers."""
        cycles = r'"estimated_cycles":"(\d+)"'
        return sum(times * int(one.find(cycles) or 0) for times, one, _ in self.executed(unknown))

    def collectives(self, unknown: int = 1) -> list[Collective]:
        """Collectives by kind and type, most bytes first.

        One that overlaps with other work is written in several fusions, from its start to its end,
        with the same channel.
        """
        times, alone = self.runs(unknown, fused=True), self.runs(unknown)
        overlapped = {
            one.channel
            for name, computation in self.computations.items()
            if name not in alone and any(one.opcode in PRODUCTS for one in computation.values())
            for one in computation.values()
            if one.opcode in COLLECTIVES
        }
        found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
        counted = set()
        for name, computation in self.computations.items():
            for one in computation.values():
                kind, channel = one.opcode.removesuffix("-start"), one.channel
                if kind not in COLLECTIVES or channel in counted:
                    continue
                counted.add(channel or one.name)
                # A started collective's result holds its operand as well: the last part counts.
                arrays = one.result if kind == one.opcode else one.result[-1:]
                for dtype in {array.dtype for array in arrays}:
                    runs = times.get(name, 0)
                    moved = runs * sum(a.bytes for a in arrays if a.dtype == dtype)
                    hidden = moved if channel in overlapped else 0
                    entry = found[kind, dtype]
                    entry[:] = map(add, entry, (runs, moved, hidden))
        listed = [Collective(*key, *entry) for key, entry in found.items()]
        return sorted(listed, key=lambda one: -one.bytes)

    def host_transfers(self) -> list[Instruction]:
        """Instructions that exchange data with the host."""
        return [
            one
            for computation in self.computations.values()
            for one in computation.values()
            if re.sub("-(start|done)$", "", one.opcode) in HOST
            or (one.opcode == "custom-call" and "callback" in one.attributes)
        ]

    def arrays(self) -> Iterator[tuple[Instruction, Array]]:
        """Every array that exists in memory, with the instruction that makes it."""
        for _, one, _ in self.executed():
            yield from ((one, array) for array in one.result)

    def largest(self, count: int) -> tuple[Held, ...]:
        """The largest arrays in HBM, one of each type and shape."""
        found: dict[tuple[str, tuple[int, ...]], Held] = {}
        for one, array in self.arrays():
            key = (array.dtype, array.shape)
            if array.on_chip or one.opcode in ("while", "tuple", "conditional") or key in found:
                continue
            found[key] = Held(array.bytes, *key, one.find(r'op_name="([^"]*)"'))
        return tuple(sorted(found.values(), key=lambda held: -held.bytes)[:count])

    def _moved(self, one: Instruction, computation: Computation) -> float | int:
        if one.opcode in FREE or one.opcode.endswith("-done") or one.opcode == "async-start":
            return 0
        operands = [computation[name] for name in one.operands if name in computation]
        if one.opcode == "fusion":
            inner = self.computations[one.called("calls")]
            parameters = {i.number: i for i in inner.values() if i.opcode == "parameter"}
            read = sum(self._read(parameters[i], inner, held) for i, held in enumerate(operands))
            return read + self._written(next(i for i in inner.values() if i.root), inner, one)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return (0 if operands[0].in_hbm == 0 else one.result[0].bytes) + one.in_hbm
        if one.opcode == "dynamic-update-slice":
            return 2 * operands[1].in_hbm
        if one.opcode.endswith("-start") and len(one.result) > 1:
            # A copy's result is (target, source, …), a slice's (source, target, …).
            target, source = one.result[:2] if "copy" in one.opcode else one.result[1::-1]
            return target.bytes * ((not target.on_chip) + (not source.on_chip))
        if one.opcode == "custom-call" and re.search(NAMES, one.attributes):
            return 0
        return sum(held.in_hbm for held in operands) + one.in_hbm

    def _read(self, parameter: Instruction, inner: Computation, held: Instruction) -> float | int:
        """Bytes that a fusion reads of one operand: only slices, if it uses nothing else of it."""
        whole = held.in_hbm
        if not whole:
            return 0
        total = 0.0
        for user in inner.values():
            if parameter.name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += user.result[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue
            elif user.opcode == "bitcast" and not user.root:
                total += self._read(user, inner, held)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")]
                total += sum(
                    self._read(one, nested, held)
                    for one in nested.values()
                    if one.opcode == "parameter" and user.operands[one.number] == parameter.name
                )
            else:
                return whole
        return min(total, whole)

    def _written(self, root: Instruction, inner: Computation, fusion: Instruction) -> float | int:
        """Bytes that a fusion writes; an update in place writes only what is updated."""
        if not fusion.in_hbm:
            return 0
        if root.opcode == "bitcast" and root.operands[0] in inner:
            return self._written(inner[root.operands[0]], inner, fusion)
        if root.opcode == "fusion":
            nested = self.computations[root.called("calls")]
            return self._written(next(i for i in nested.values() if i.root), nested, fusion)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(fusion.result):
            return fusion.in_hbm
        total = 0.0
        for part, array in zip(parts, fusion.result, strict=True):
            updates = part.opcode == "dynamic-update-slice"
            size = inner[part.operands[1]].result[0].bytes if updates else array.bytes
            total += 0 if array.on_chip else size
        return total


def parse(text: str) -> Module:
    """A compiled program's `as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            if opened := _COMPUTATION.match(line):
                current = computations[opened[2]] = {}
                entry = opened[2] if opened[1] else entry
        elif _END.match(line):
            current = None
        elif found := _INSTRUCTION.match(_COMMENT.sub("", line)):
            root, name, result, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0]))
            current[name] = Instruction(
                name, opcode, arrays_of(result), operands, rest, root is not None
            )
    return Module(computations, entry)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a result type, tuples flattened: `(bf16[8,128]{1,0:T(8,128)S(1)}, s32[])`."""
    return tuple(
        Array(
            dtype,
            shape := tuple(map(int, filter(None, sizes.split(",")))),
            padded(shape, layout) * BYTES[dtype],
            any(space in layout for space in ON_CHIP),
        )
        for dtype, sizes, layout in _ARRAY.findall(text)
        if dtype in BYTES
    )


def padded(shape: tuple[int, ...], layout: str) -> int:
    """Elements that an array takes in memory: the last two dimensions fill whole tiles."""
    order, _, tiling = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    if not shape or not tile:
        return math.prod(shape)
    minor_to_major = [int(axis) for axis in order.split(",") if axis]
    sizes = [shape[axis] for axis in minor_to_major]
    for axis, side in enumerate(reversed([int(side) for side in tile[1].split(",")])):
        if axis < len(sizes):
            sizes[axis] = -(-sizes[axis] // side) * side
    return math.prod(sizes)
