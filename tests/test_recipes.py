"""The recipes that are shipped."""

import re
from pathlib import Path

import pytest

from flax_distil import cli
from flax_distil.config import DistillConfig, FilterConfig, PseudoLabelConfig
from flax_distil.model.dims import PUBLISHED
from flax_distil.plan.planner import sizes_of
from flax_distil.pseudo_label.jobs import by_dataset
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
    """large-v2-32-2: 32 encoder and 2 decoder layers of large-v2; words may follow."""
    if recipe.stem == "smoke" or recipe.stem.startswith("sweep"):
        return
    *name, encoder, decoder = re.sub(r"(-[a-z]+)+$", "", recipe.stem).split("-")
    teacher = "-".join(name).removesuffix("-en") + (".en" if name[-1] == "en" else "")
    distill = load_recipe(recipe, DistillConfig)
    sizes = sizes_of(recipe, distill)
    assert sizes.teacher == PUBLISHED[teacher]
    assert (sizes.student.encoder_layers, sizes.student.decoder_layers) == (
        int(encoder), int(decoder),
    )  # fmt: skip
    longest = load_recipe(recipe, PseudoLabelConfig).max_tokens + 5  # prompt and end of text
    assert longest <= max(distill.label_buckets)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_is_labelled_is_filtered_and_trained_on(recipe):
    """Each dataset's store, by the name that pseudo-label gives it."""
    label, chosen = load_recipe(recipe, PseudoLabelConfig), load_recipe(recipe, FilterConfig)
    distill = load_recipe(recipe, DistillConfig)
    assert chosen.source == label.output_dir
    stores = [one.output_dir.relative_to(label.output_dir) for one in by_dataset(label)]
    assert list(distill.labels) == [chosen.output_dir / store for store in stores]


def test_the_papers_recipes_are_the_papers():
    """Tables 2 and 15 of arXiv 2311.00430: nine datasets, half of the timestamps, no prompts."""
    for name in ("large-v2-32-2", "medium-en-24-2"):
        recipe = next(path for path in RECIPES if path.stem == name)
        label, distill = load_recipe(recipe, PseudoLabelConfig), load_recipe(recipe, DistillConfig)
        assert len({data.source for data in label.datasets}) == 9
        assert label.timestamps
        assert (distill.timestamp_probability, distill.prompt_probability) == (0.5, 0.0)
