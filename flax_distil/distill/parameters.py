"""A table of all parameters of a run: name, shape, dtype, sharding, trained or frozen."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from flax_distil.distill.step import Frozen
from flax_distil.model.spec import Params
from flax_distil.parallel.multihost import is_main_host


class ParameterRow(NamedTuple):
    """One parameter, or the same one of layers 0 … N-1: then `name` has `layers.0–31`."""

    name: str
    shape: str
    dtype: str
    sharding: str
    status: str
    size: int


def show_parameters(trained: Params, frozen: Frozen) -> None:
    """Print the table to standard error, on the main host alone."""
    if is_main_host():
        Console(stderr=True).print(parameter_table(trained, frozen))


def parameter_table(trained: Params, frozen: Frozen) -> Table:
    """The table, and the numbers of trained and frozen parameters in its caption."""
    groups = (
        ("student", trained, "trained"),
        ("student.encoder", frozen.student_encoder, "frozen"),
        ("teacher", frozen.teacher, "frozen"),
    )
    rows = [row for group in groups for row in parameter_rows(*group)]
    counts = {"trained": 0, "frozen": 0}
    table = Table("parameter", "shape", "dtype", "sharding", "")
    for row in rows:
        counts[row.status] += row.size
        table.add_row(*row[:-1])
    table.caption = ", ".join(f"{size / 1e6:,.1f} M {name}" for name, size in counts.items())
    return table


def parameter_rows(prefix: str, tree: Any, status: str) -> Iterator[ParameterRow]:
    """A row a parameter; layers whose parameters look the same share their rows."""
    layers: dict[tuple[str, str, str, str], list[int]] = {}
    sizes: dict[tuple[str, str, str, str], int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
        layer = re.search(r"layers\.(\d+)\.", name)
        key = (
            re.sub(r"layers\.\d+\.", "layers.*.", name),
            " × ".join(map(str, leaf.shape)) or "scalar",
            str(leaf.dtype),
            str(getattr(leaf.sharding, "spec", "one device")).removeprefix("PartitionSpec"),
        )
        layers.setdefault(key, []).extend([int(layer[1])] if layer else [])
        sizes[key] = sizes.get(key, 0) + leaf.size
    for (name, shape, dtype, sharding), numbers in layers.items():
        span = f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else "".join(map(str, numbers))
        size = sizes[name, shape, dtype, sharding]
        yield ParameterRow(name.replace("*", span), shape, dtype, sharding, status, size)
