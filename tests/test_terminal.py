"""Tables that are wider than the terminal are divided, not folded cell by cell."""

import pytest
from rich.console import Console

from flax_distil.terminal import print_table


@pytest.mark.parametrize("width", [60, 80, 400])
def test_every_cell_is_on_one_line_and_every_part_names_its_rows(width, capsys):
    headings = ["dataset", "model", *(f"a long heading {n}" for n in range(9))]
    rows = [["heldout", name, *(f"{n}.0 (1.0 to {n}9.0)" for n in range(9))] for name in "[ab]"]
    print_table(headings, rows, keys=2, title="[Title]", console=Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].strip() == "[Title]"
    for text in (*headings[2:], *rows[0][2:]):
        assert any(text in line for line in lines), text
    parts = sum("───" in line for line in lines)
    assert (parts == 1) == (width == 400)
    assert sum(line.startswith("heldout") for line in lines) == parts * len(rows)


def test_long_names_of_rows_are_wrapped_to_half_of_the_width(capsys):
    print_table(["run", "loss"], [["a/very/" * 20, "0.5"]], console=Console(width=40))
    first = capsys.readouterr().out.splitlines()[2]
    assert first.startswith("a/very/")
    assert first.endswith("0.5")
    assert len(first) < 30
