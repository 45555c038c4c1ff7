"""A plan as tables for people, and as JSON for programs."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flax_distil.config import PlanConfig
from flax_distil.errors import InputError
from flax_distil.plan.estimate import Estimate, TooLarge
from flax_distil.plan.topology import GIB, Slice, libtpu_version

TABLE = ("<!-- plan table: begin -->", "<!-- plan table: end -->")
NOTHING = "–"
COLUMNS = (
    "recipe", "slice", "program", "clips a chip", "at a time", "HBM, GiB", "most at a time",
    "ms at least", "limit", "MFU at most", "hours at least", "chip-hours",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What the programs of a recipe take on one slice. steps: updates of the training run."""

    recipe: Path
    target: Slice
    steps: int
    programs: tuple[Estimate | TooLarge, ...]

    @property
    def fits(self) -> bool:
        return not any(isinstance(one, TooLarge) for one in self.programs)

    def hours(self, mfu: float | None) -> float | None:
        """Of the training run: at a share of the peak, else the roofline's. None: it has no plan.

        Where the usual label was asked for, it is the last train program.
        """
        train = [one for one in self.programs if one.program == "train"]
        if not train or not isinstance(train[-1], Estimate):
            return None
        seconds = train[-1].seconds
        return self.steps * (seconds.bound if mfu is None else seconds.compute / mfu) / 3600


def as_json(plans: list[Plan], config: PlanConfig) -> str:
    """All of the plans; bytes, seconds, FLOPs."""
    return json.dumps([plan_record(plan, config) for plan in plans], indent=2)


def plan_record(plan: Plan, config: PlanConfig) -> dict[str, Any]:
    """One plan as plain values."""
    hours = plan.hours(config.mfu)
    return {
        "recipe": str(plan.recipe),
        "slice": plan.target.name,
        "chips": plan.target.chips,
        "versions": {"jax": version("jax"), "libtpu": libtpu_version()},
        "fits": plan.fits,
        "steps": plan.steps,
        "hours": hours,
        "chip_hours": None if hours is None else hours * plan.target.chips,
        "price": price(plan, config),
        "programs": [program_record(one) for one in plan.programs],
    }


def program_record(one: Estimate | TooLarge) -> dict[str, Any]:
    """One program's figures, with those that follow from them."""
    record = dataclasses.asdict(one) | {"fits": isinstance(one, Estimate)}
    if isinstance(one, TooLarge):
        fitting = one.fitting and program_record(one.fitting)
        return record | {"largest_batch": one.largest_batch, "fitting": fitting}
    record["tensors"] = [tensor._asdict() for tensor in one.tensors]
    record["seconds"] = one.seconds._asdict() | {"bound": one.seconds.bound}
    record["collectives"] = [collective._asdict() for collective in one.collectives]
    return record | {"intensity": one.intensity, "mfu": one.mfu}


def price(plan: Plan, config: PlanConfig) -> float | None:
    """Of the training run, in the user's currency."""
    hours = plan.hours(config.mfu)
    if hours is None or config.chip_hour_price is None:
        return None
    return hours * plan.target.chips * config.chip_hour_price


def print_plan(plan: Plan, config: PlanConfig) -> None:
    """The plan on the console."""
    console = Console()
    chip = plan.target.chip
    console.print(
        f"\n[bold]{plan.recipe.stem} on {plan.target.name}[/]: {plan.target.chips} chips with "
        f"{chip.memory / GIB:.0f} GiB, {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.bandwidth / 1e9:,.0f} GB/s each"
    )
    console.print(programs_table(plan))
    for one in plan.programs:
        tokens = f", {one.length} tokens" if one.length else ""
        line = f"{tokens} (compiler's answer: {one.source}): {details(one)}"
        console.print(f"[bold]{one.program}[/]{escape(line)}")
    hours = plan.hours(config.mfu)
    if hours is not None:
        basis = "at the roofline, at least" if config.mfu is None else f"at {config.mfu:.0%} MFU"
        line = f"{plan.steps:,} updates, {basis}: {hours:,.1f} h, "
        line += f"{hours * plan.target.chips:,.0f} chip-hours"
        cost = price(plan, config)
        console.print(line + ("" if cost is None else f", {cost:,.0f} at your price"))


def programs_table(plan: Plan) -> Table:
    """A table with a column for each program."""
    table = Table("a chip")
    for one in plan.programs:
        tokens = f", {one.length} tokens" if one.length else ""
        table.add_column(f"{one.program}{tokens}", justify="right")
    names = (
        *("clips at once", "fits", "HBM, GiB", "most at once", "TFLOP", "HBM traffic, GB"),
        *("FLOP/byte", "links, MB", "ms at least", "limit", "MFU at most"),
    )
    for name, *cells in zip(names, *map(figures, plan.programs), strict=True):
        table.add_row(name, *cells)
    return table


def figures(one: Estimate | TooLarge) -> list[str]:
    """A program's column: what is not known of one that does not fit is empty."""
    most = "" if one.largest_batch is None else str(one.largest_batch)
    if isinstance(one, TooLarge):
        memory = f"{one.needed / GIB:.1f} of {one.available / GIB:.1f}"
        return [str(one.rows), "no", memory, most, *[""] * 7]
    moved = sum(collective.bytes for collective in one.collectives)
    return [
        str(one.rows),
        "yes",
        f"{one.memory / GIB:.1f} of {one.capacity / GIB:.0f}",
        most,
        f"{one.flops / one.chips / 1e12:.2f}",
        f"{one.traffic / 1e9:.1f}",
        f"{one.intensity:.0f}",
        f"{moved / 1e6:.0f}",
        f"{1e3 * one.seconds.bound:.1f}",
        one.seconds.limit,
        f"{one.mfu:.0%}",
    ]


def details(one: Estimate | TooLarge) -> str:
    """What fills the memory and crosses the links; of what does not fit, what to turn."""
    if isinstance(one, TooLarge):
        return remedy(one)
    links = ", ".join(
        f"{collective.times:.0f} {collective.kind} of {collective.bytes / 1e6:,.1f} MB "
        f"{collective.dtype} ({collective.overlapped / collective.bytes:.0%} overlapped)"
        for collective in one.collectives
        if collective.bytes >= 1e5
    )
    host = f"; waits for the host: {', '.join(one.host_transfers)}" if one.host_transfers else ""
    cycles = f"{one.cycles / 1e6:,.0f} million cycles expected by the compiler, kernels left out"
    return f"{filling(one)}; {links or 'nothing crosses the links'}{host}; {cycles}"


def filling(one: Estimate) -> str:
    """What fills a chip's memory, in GiB."""
    parts = {**one.arguments, "temporaries": one.temporaries}
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()) + " GiB"


def remedy(one: TooLarge) -> str:
    """The option that makes a program fit, and what fills the memory then."""
    train, fitting = one.program == "train", one.fitting
    if fitting is None:
        held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in one.arguments.items())
        cure = "shard them with compute.fsdp" if train else "choose chips with more memory"
        return f"does not fit even with one clip a chip, beside {held} GiB: {cure}"
    if train:
        times = next(n for n in divisors(one.rows) if one.rows // n <= fitting.rows)
        cure = f"compute.accumulation {times} times as large ({one.rows // times} at a time)"
    else:  # batches are padded to a power of two
        most = 1 << (fitting.rows * fitting.chips).bit_length() - 1
        cure = f"a batch_size of at most {most}"
    lines = [
        f"needs {one.needed / GIB:.1f} of {one.available / GIB:.1f} GiB; fits with {fitting.rows} "
        f"clips a chip at a time: {cure}. That takes {fitting.memory / GIB:.1f} GiB: "
        f"{filling(fitting)}. Its largest tensors become less",
    ]
    for knob, tensors in groupby(
        sorted(fitting.tensors, key=attrgetter("knob")), attrgetter("knob")
    ):
        lines.append(f"  by {knob}:")
        lines += [
            f"    {tensor.bytes / GIB:5.2f} GiB {tensor.dtype}{list(tensor.shape)} {tensor.where}"
            for tensor in tensors
        ]
    return "\n".join(lines)


def divisors(number: int) -> list[int]:
    """From 1 upwards."""
    return [n for n in range(1, number + 1) if number % n == 0]


def write_table(path: Path, plans: list[Plan]) -> None:
    """Puts the plans into the table between the markers of a Markdown file.

    Rows of other recipes, slices and programs stay.

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
        for row in table_rows(plan):
            rows[tuple(row[:3])] = row
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(rows[key] for key in sorted(rows))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    path.write_text(f"{text[:begin]}\n{table}\n{text[end:]}", encoding="utf-8")


def table_rows(plan: Plan) -> list[list[str]]:
    """A row a program, as `COLUMNS` name its cells; hours stand at the training run."""
    rows = []
    for one in plan.programs:
        tokens = f", {one.length} tokens" if one.length else ""
        row = [plan.recipe.stem, plan.target.name, one.program + tokens]
        row += [f"{one.clips / one.chips:g}", str(one.rows)]
        most = NOTHING if one.largest_batch is None else str(one.largest_batch)
        if isinstance(one, TooLarge):
            row += [f"{one.needed / GIB:.1f} of {one.available / GIB:.1f}: no", most]
            rows.append([*row, *[NOTHING] * 5])
            continue
        row += [f"{one.memory / GIB:.1f} of {one.capacity / GIB:.0f}", most]
        row += [f"{1e3 * one.seconds.bound:.0f}", one.seconds.limit, f"{one.mfu:.0%}"]
        if one.program == "train":
            hours = plan.steps * one.seconds.bound / 3600
            row += [f"{hours:,.1f}", f"{hours * plan.target.chips:,.0f}"]
        else:
            row += [NOTHING] * 2
        rows.append(row)
    return rows
