"""The table of parameters that a run begins with."""

import io

import jax
from rich.console import Console

from flax_distil.distill.setup import parameter_table, split_parameters


def test_layers_of_one_shape_share_a_row(train_spec, teacher, student):
    trained, frozen = jax.device_put(split_parameters(train_spec, teacher.params, student.params))
    console = Console(file=io.StringIO(), width=200)
    console.print(parameter_table(trained, frozen))
    lines = console.file.getvalue().splitlines()
    (up,) = [line for line in lines if "student.decoder" in line and "up.kernel" in line]
    cells = [cell.strip() for cell in up.strip("│").split("│")]
    dims = student.dims
    assert cells[0] == "student.decoder.layers.0–1.feed_forward.up.kernel"
    assert cells[1:3] == [f"{dims.width} × {dims.decoder_ffn}", "float32"]
    assert cells[4] == "trained"
    (theirs,) = [line for line in lines if "teacher.decoder" in line and "up.kernel" in line]
    assert f"layers.0–{teacher.dims.decoder_layers - 1}." in theirs
    assert "frozen" in theirs
    count = sum(leaf.size for leaf in jax.tree.leaves(trained)) / 1e6
    assert f"{count:,.1f} M trained" in lines[-1]
