"""The recipes that are shipped."""

from pathlib import Path

import pytest

from flax_distil import cli
from flax_distil.config import DistillConfig, PseudoLabelConfig
from flax_distil.model.dims import PUBLISHED
from flax_distil.plan.planner import sizes_of
from flax_distil.recipe import load_recipe, recipe_stages

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_stage_of_a_recipe_parses_without_another_flag(recipe):
    stages = recipe_stages(recipe)
    assert {"pseudo-label", "init-student", "distill", "evaluate"} <= set(stages)
    for stage in stages:
        assert isinstance(cli.parse([stage, "--recipe", str(recipe)]), cli.VERBS[stage].config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_s_head_says_command_hardware_and_result(recipe):
    head = [line for line in recipe.read_text().split("\n\n")[0].splitlines()]
    assert all(line.startswith("#") for line in head)
    text = " ".join(head)
    assert f"--recipe recipes/{recipe.name}" in text
    assert "Hardware:" in text
    assert "Result:" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_after_its_student(recipe):
    """large-v2-32-2: 32 encoder and 2 decoder layers of large-v2."""
    if recipe.stem == "smoke":
        return
    *name, encoder, decoder = recipe.stem.split("-")
    teacher = "-".join(name).removesuffix("-en") + (".en" if name[-1] == "en" else "")
    distill = load_recipe(recipe, DistillConfig)
    sizes = sizes_of(recipe, distill)
    assert sizes.teacher == PUBLISHED[teacher]
    assert (sizes.student.encoder_layers, sizes.student.decoder_layers) == (
        int(encoder), int(decoder),
    )  # fmt: skip
    longest = load_recipe(recipe, PseudoLabelConfig).max_tokens + 5  # prompt and end of text
    assert longest <= max(distill.label_buckets)
