"""Which programs a recipe is asked about; what the compiler would say of them is left out."""

from dataclasses import replace
from pathlib import Path

import pytest

from flax_distil.config import PlanConfig
from flax_distil.errors import InputError
from flax_distil.plan import planner, run, topology
from flax_distil.plan.compiler import Program, Refusal
from flax_distil.plan.report import TABLE, TooLarge

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke.toml"
CONFIG = PlanConfig((SMOKE,), ("v5e-8",))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """Clips a chip, and chips, of each program that was asked about."""
    if not topology.libtpu_version():
        pytest.skip("libtpu has wheels for x86-64 Linux alone")
    found = []

    def estimate(_program, rows, _slice, chips, *_):
        found.append((rows, chips))
        program = Program("train", rows, rows, 0, 0, {}, None)
        return TooLarge(program, Refusal(2.0, 1.0), chips, None)

    monkeypatch.setattr(planner, "estimate", estimate)
    return found


def test_a_search_begins_where_the_recipe_does_not_divide(asked):
    """Four clips on eight chips of one host."""
    with pytest.raises(InputError, match="batch 4 does not divide over 8 data shards: use 8"):
        planner.plan(SMOKE, "v5e-8", CONFIG)
    planner.plan(SMOKE, "v5e-8", replace(CONFIG, batch="auto"))
    assert asked == [(1, 8)] * 5  # train, and encoder and search of both other stages


def test_what_cannot_be_planned_is_said_before_the_compiler_is_asked(asked, tmp_path):
    recipe = tmp_path / "recipe.toml"
    text = SMOKE.read_text()
    recipe.write_text(text[: text.index("[evaluate]")])
    with pytest.raises(InputError, match=r"recipe.toml has no table to plan evaluate by"):
        planner.plan(recipe, "v4-8", replace(CONFIG, programs=("evaluate",)))
    table = tmp_path / "table.md"
    table.write_text(f"{TABLE[0]}\n")
    with pytest.raises(InputError, match=r"table.md has no lines"):
        run(replace(CONFIG, batch="auto", table=table))
    assert asked == []


def test_a_run_of_epochs_needs_the_number_of_clips(asked, tmp_path):
    recipe, config = tmp_path / "recipe.toml", replace(CONFIG, batch="auto")
    recipe.write_text(SMOKE.read_text().replace("\nsteps = 2\n", "\nepochs = 3.0\n"))
    with pytest.raises(InputError, match=r"epochs is 3 and .* not known.*--clips"):
        planner.plan(recipe, "v5e-8", config)
    assert planner.plan(recipe, "v5e-8", replace(config, clips=100)).steps == 75
