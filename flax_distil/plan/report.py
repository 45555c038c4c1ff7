"""What compiled programs take: memory, traffic and a lower bound of time; as tables and as JSON."""

from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flax_distil.config import PlanConfig
from flax_distil.errors import InputError
from flax_distil.plan.compiler import Compiled, Program, Refusal
from flax_distil.plan.hlo import Held
from flax_distil.plan.topology import GIB, Slice, libtpu_version

TABLE = ("<!-- plan table: begin -->", "<!-- plan table: end -->")
NOTHING = "–"
COLUMNS = (  # of the Markdown table
    "recipe", "slice", "program", "clips a chip", "at a time", "HBM, GiB", "most at a time",
    "ms at least", "limit", "MFU at most", "hours at least", "chip-hours",
)  # fmt: skip


class Seconds(NamedTuple):
    """The roofline: the time of one run if limited by one of the three alone."""

    compute: float
    memory: float | int
    network: float

    @property
    def bound(self) -> float:
        """All three perfectly overlapped."""
        return max(self)

    @property
    def limit(self) -> str:
        """What limits the run."""
        return self._fields[self.index(self.bound)]


@dataclass(frozen=True)
class Estimate:
    """What one program takes on a chip of a slice.

    chips: those that it runs on. vocabulary: of its model. largest_batch: clips of a chip at a time
    that fit, if they were searched.
    """

    program: Program
    answer: Compiled
    target: Slice
    chips: int
    vocabulary: int
    largest_batch: int | None = None

    @property
    def seconds(self) -> Seconds:
        """On one chip at the published peaks.

        A ring over n chips moves 2 (n - 1) / n of an all-reduced array through each chip, and half
        as much of the whole array of any other collective.
        """
        chip, answer = self.target.chip, self.answer
        factors = {"all-reduce": 2, "reduce-scatter": self.chips}
        moved = sum(one.bytes * factors.get(one.kind, 1) for one in answer.collectives)
        moved *= (self.chips - 1) / self.chips
        flops = self.program.flops / self.chips
        return Seconds(flops / chip.flops, answer.traffic / chip.bandwidth, moved / chip.links)

    @property
    def mfu(self) -> float:
        """The share of the peak that the bound allows."""
        return self.seconds.compute / self.seconds.bound

    @property
    def intensity(self) -> float:
        """Useful FLOPs for a byte of HBM traffic."""
        return self.program.flops / self.chips / self.answer.traffic

    @property
    def tensors(self) -> list[tuple[str, Held]]:
        """(option that makes it smaller, array) of the largest arrays in HBM."""
        return [
            (knob(held.shape, held.where, self.program, self.vocabulary), held)
            for held in self.answer.tensors[:5]
        ]


@dataclass(frozen=True)
class TooLarge:
    """A program that does not fit.

    fitting: the same program with the most clips at a time that fit; None where not even one does.
    """

    program: Program
    answer: Refusal
    chips: int
    fitting: Estimate | None

    @property
    def largest_batch(self) -> int | None:
        """Clips a chip at a time with which it fits."""
        return self.fitting and self.fitting.program.rows


def knob(shape: tuple[int, ...], where: str, program: Program, vocabulary: int) -> str:
    """The option that makes a tensor smaller, by its shape and its origin."""
    if program.name != "train":
        return "a smaller batch_size"
    if vocabulary in shape and len(shape) > 2:
        return "a smaller compute.vocabulary_chunk (logits of fewer tokens at a time)"
    if where.startswith(("state", "frozen")):
        return "compute.fsdp (parameters and moments sharded over more chips)"
    if "jvp" in where and len(shape) > 3:
        return "compute.remat = true (student layers computed again in the backward pass)"
    return "compute.accumulation, twice as much (half the clips at a time)"


@dataclass(frozen=True)
class Plan:
    """What the programs of a recipe take on one slice. steps: updates of the training run."""

    recipe: Path
    target: Slice
    steps: int
    programs: tuple[Estimate | TooLarge, ...]

    def hours(self, mfu: float | None) -> float | None:
        """Hours of the training run at this MFU, else at the roofline; None if it was not planned.

        They are those of the last train program, which has the usual label length.
        """
        train = [one for one in self.programs if one.program.name == "train"]
        if not train or not isinstance(train[-1], Estimate):
            return None
        seconds = train[-1].seconds
        return self.steps * (seconds.bound if mfu is None else seconds.compute / mfu) / 3600


def plan_record(plan: Plan, config: PlanConfig) -> dict[str, Any]:
    """One plan as plain values: bytes, seconds, FLOPs, and a price in the user's currency."""
    hours, price = plan.hours(config.mfu), config.chip_hour_price
    chip_hours = None if hours is None else hours * plan.target.chips
    return {
        "recipe": str(plan.recipe),
        "slice": plan.target.name,
        "chips": plan.target.chips,
        "versions": {"jax": version("jax"), "libtpu": libtpu_version()},
        "fits": all(isinstance(one, Estimate) for one in plan.programs),
        "steps": plan.steps,
        "hours": hours,
        "chip_hours": chip_hours,
        "price": None if chip_hours is None or price is None else chip_hours * price,
        "programs": [program_record(one) for one in plan.programs],
    }


def program_record(one: Estimate | TooLarge) -> dict[str, Any]:
    """One program's figures, with those that follow from them."""
    asked = {name: vars(one.program)[name] for name in ("clips", "rows", "length", "arguments")}
    record = vars(one.answer) | asked | {"program": one.program.name, "chips": one.chips}
    record |= {"fits": isinstance(one, Estimate), "largest_batch": one.largest_batch}
    if isinstance(one, TooLarge):
        return record | {"fitting": one.fitting and program_record(one.fitting)}
    return record | {
        "memory": one.answer.memory,
        "capacity": one.target.chip.memory,
        "flops": one.program.flops,
        "collectives": [collective._asdict() for collective in one.answer.collectives],
        "seconds": one.seconds._asdict() | {"bound": one.seconds.bound},
        "tensors": [held._asdict() | {"knob": knob} for knob, held in one.tensors],
        "intensity": one.intensity,
        "mfu": one.mfu,
    }


def print_plan(plan: Plan, config: PlanConfig) -> None:
    """The plan on the console."""
    console = Console()
    chip = plan.target.chip
    console.print(
        f"\n[bold]{plan.recipe.stem} on {plan.target.name}[/]: {plan.target.chips} chips with "
        f"{chip.memory / GIB:.0f} GiB, {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.bandwidth / 1e9:,.0f} GB/s each"
    )
    columns = [cells(plan, one) for one in plan.programs]
    table = Table("a chip")
    for column in columns:
        table.add_column(column["program"], justify="right")
    for name in list(dict.fromkeys(name for column in columns for name in column))[3:]:
        table.add_row(name, *(column.get(name, "") for column in columns))
    console.print(table)
    for one, column in zip(plan.programs, columns, strict=True):
        line = f" (compiler's answer: {one.answer.source}): {details(one)}"
        console.print(f"[bold]{column['program']}[/]{escape(line)}")
    record = plan_record(plan, config)
    if record["hours"] is not None:
        basis = "at the roofline, at least" if config.mfu is None else f"at {config.mfu:.0%} MFU"
        line = f"{plan.steps:,} updates, {basis}: {record['hours']:,.1f} h, "
        line += f"{record['chip_hours']:,.0f} chip-hours"
        price = record["price"]
        console.print(line + ("" if price is None else f", {price:,.0f} at your price"))


def cells(plan: Plan, one: Estimate | TooLarge) -> dict[str, str]:
    """A program's figures by their names in tables; unknown ones are left out."""
    program = one.program
    tokens = f", {program.length} tokens" if program.length else ""
    found = {
        "recipe": plan.recipe.stem,
        "slice": plan.target.name,
        "program": program.name + tokens,
        "clips a chip": f"{program.clips / one.chips:g}",
        "at a time": str(program.rows),
    }
    if one.largest_batch is not None:
        found["most at a time"] = str(one.largest_batch)
    if isinstance(one, TooLarge):
        memory = f"{one.answer.needed / GIB:.1f} of {one.answer.available / GIB:.1f}: no"
        return found | {"HBM, GiB": memory}
    if program.name == "train":
        hours = plan.steps * one.seconds.bound / 3600
        found |= {"hours at least": f"{hours:,.1f}", "chip-hours": f"{hours * one.chips:,.0f}"}
    moved = sum(collective.bytes for collective in one.answer.collectives)
    return found | {
        "HBM, GiB": f"{one.answer.memory / GIB:.1f} of {one.target.chip.memory / GIB:.0f}",
        "TFLOP": f"{program.flops / one.chips / 1e12:.2f}",
        "HBM traffic, GB": f"{one.answer.traffic / 1e9:.1f}",
        "FLOP/byte": f"{one.intensity:.0f}",
        "links, MB": f"{moved / 1e6:.0f}",
        "ms at least": f"{1e3 * one.seconds.bound:.0f}",
        "limit": one.seconds.limit,
        "MFU at most": f"{one.mfu:.0%}",
    }


def details(one: Estimate | TooLarge) -> str:
    """Memory, link traffic and cycles; the remedy for a program that does not fit."""
    if isinstance(one, TooLarge):
        return remedy(one)
    answer = one.answer
    links = ", ".join(
        f"{collective.times:.0f} {collective.kind} of {collective.bytes / 1e6:,.1f} MB "
        f"{collective.dtype} ({collective.overlapped / collective.bytes:.0%} overlapped)"
        for collective in answer.collectives
        if collective.bytes >= 1e5
    )
    waits = answer.host_transfers
    host = f"; waits for the host: {', '.join(waits)}" if waits else ""
    cycles = f"{answer.cycles / 1e6:,.0f} million cycles expected by the compiler, kernels left out"
    return f"{memory_of(one)}; {links or 'nothing crosses the links'}{host}; {cycles}"


def memory_of(one: Estimate) -> str:
    """Arguments and temporaries on a chip, in GiB."""
    parts = {**one.program.arguments, "temporaries": one.answer.temporaries}
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()) + " GiB"


def remedy(one: TooLarge) -> str:
    """The option with which a program fits, and the memory that it takes then."""
    program, answer, fitting = one.program, one.answer, one.fitting
    train = program.name == "train"
    if fitting is None:
        held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in program.arguments.items())
        advice = "shard them with compute.fsdp" if train else "choose chips with more memory"
        return f"does not fit even with one clip per chip; arguments take {held} GiB: {advice}"
    rows, fitting_rows = program.rows, fitting.program.rows
    if train:
        times = next(n for n in range(1, rows + 1) if not rows % n and rows // n <= fitting_rows)
        advice = f"compute.accumulation {times} times as large ({rows // times} at a time)"
    else:  # batches are padded to a power of two
        most = 1 << (fitting_rows * fitting.chips).bit_length() - 1
        advice = f"a batch_size of at most {most}"
    lines = [
        f"needs {answer.needed / GIB:.1f} of {answer.available / GIB:.1f} GiB; fits with "
        f"{fitting_rows} clips a chip at a time: {advice}. That takes "
        f"{fitting.answer.memory / GIB:.1f} GiB: {memory_of(fitting)}. Its largest tensors become "
        "less"
    ]
    for knob, tensors in groupby(sorted(fitting.tensors, key=itemgetter(0)), itemgetter(0)):
        lines.append(f"  by {knob}:")
        lines += [
            f"    {held.bytes / GIB:5.2f} GiB {held.dtype}{list(held.shape)} {held.where}"
            for _, held in tensors
        ]
    return "\n".join(lines)


def write_table(path: Path, plans: list[Plan]) -> None:
    """Update the table between the markers of a Markdown file.

    Rows of other recipes, slices and programs are kept.

    Raises:
        InputError: the file does not exist or has no markers.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    begin, end = (text.find(marker) for marker in TABLE)
    if min(begin, end) < 0:
        raise InputError(f"{path} has no lines {TABLE[0]} and {TABLE[1]} to put the table between")
    begin += len(TABLE[0])
    old = [line.strip("| ").split(" | ") for line in text[begin:end].splitlines()[3:]]
    rows = {tuple(row[:3]): row for row in old if len(row) == len(COLUMNS)}
    for plan in plans:
        for one in plan.programs:
            found = cells(plan, one)
            row = [found.get(name, NOTHING) for name in COLUMNS]
            rows[tuple(row[:3])] = row
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(rows[key] for key in sorted(rows))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    path.write_text(f"{text[:begin]}\n{table}\n{text[end:]}", encoding="utf-8")
