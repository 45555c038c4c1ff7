"""Tables on the terminal that can be read at any width."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GAP = 2  # between columns: a space and a border that is not drawn


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    keys: int = 1,
    title: str = "",
    console: Console | None = None,
) -> None:
    """Print a table, divided into several below each other where it is wider than the terminal.

    keys: number of the first columns, which name the rows: every part has them, and they are
    wrapped to half of the width.
    """
    console = console or Console()
    columns = list(zip(headings, *rows, strict=True))
    sizes = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    while sum(sizes[:keys]) > console.width // 2:
        sizes[sizes.index(max(sizes[:keys]))] -= 1
    left = console.width - sum(size + GAP for size in sizes[:keys])
    parts: list[list[int]] = [[]]
    for number in range(keys, len(columns)):
        if parts[-1] and sum(sizes[n] + GAP for n in (*parts[-1], number)) > left:
            parts.append([])
        parts[-1].append(number)
    if title:
        console.print(f"[bold]{escape(title)}[/]", highlight=False)
    for part in parts:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number in (*range(keys), *part):
            table.add_column(
                escape(headings[number]),
                justify="left" if number < keys else "right",
                max_width=sizes[number] if number < keys else None,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(escape(row[number]) for number in (*range(keys), *part)))
        console.print(table, "")
