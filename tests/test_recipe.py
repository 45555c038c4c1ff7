import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from flax_distil.config import EvaluateConfig, FilterConfig
from flax_distil.errors import InputError
from flax_distil.recipe import load_recipe, recipe_stages, save_recipe, stage_name


@dataclasses.dataclass(frozen=True)
class Schedule:
    warm_up: int
    peak: float = 1e-4


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    student: Path
    schedule: Schedule
    layers: int | tuple[int, ...] = 2
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["best", "latest"] | int = "best"
    limit: int | None = 5
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    sets: tuple[str, ...] = ()
    tied: bool = True
    name: str | None = None
    more: Schedule | None = None


FULL = DistillConfig(
    student=Path("runs/student"),
    schedule=Schedule(500, 3e-5),
    layers=(0, 3),
    kind=1200,
    limit=None,
    weights={"a": 0.5, "b": 2.0},
    sets=("x", 'quote " and ü'),
    tied=False,
    more=Schedule(1),
)


@pytest.mark.parametrize("config", [FULL, DistillConfig(Path("s"), Schedule(1))])
def test_a_recipe_that_was_saved_is_read_back_equal(tmp_path, config):
    save_recipe(config, tmp_path / "runs" / "recipe.toml")
    assert load_recipe(tmp_path / "runs" / "recipe.toml", DistillConfig) == config


def test_a_path_that_toml_cannot_hold_is_refused(tmp_path):
    config = FilterConfig(Path("caf\udce9"), tmp_path)
    with pytest.raises(InputError, match=r"not UTF-8 \(.*udce9.*rename it"):
        save_recipe(config, tmp_path / "recipe.toml")
    assert not (tmp_path / "recipe.toml").exists()


def test_one_file_holds_several_stages(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("# why this run\n[pseudo_label]\nsource = 'x'\n")
    judge = EvaluateConfig(models=("a",), datasets=("b", "c"))
    save_recipe(FULL, path)
    save_recipe(judge, path)
    assert load_recipe(path, EvaluateConfig) == judge
    assert load_recipe(path, DistillConfig) == FULL
    assert "# why this run" in path.read_text()


def test_the_fields_of_one_stage_may_stand_alone(tmp_path):
    path = tmp_path / "evaluate.toml"
    path.write_text('models = ["a"]\ndatasets = ["b"]\nbatch-size = 3\n')
    assert load_recipe(path, EvaluateConfig) == EvaluateConfig(("a",), ("b",), batch_size=3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[evaluate]\nmodles = []", r"no field modles \(did you mean models or methods\?\)"),
        ("[evaluat]\nmodels = []", "no field evaluat"),
        ("[evaluate]\n[destill]", r"no stage destill \(did you mean distill\?\)"),
        ("[distill]\nx = 1", r"no table \[evaluate\]; it has distill"),
        ("datasets = ['a']", "no models: EvaluateConfig needs it"),
        ("models = 'a'", "models = 'a': must be a valid array"),
        ("models = [1]", r"models\[0\] = 1: must be a valid string"),
        ("batch_size = true", "batch_size = True: must be a valid integer"),
        ("batch_size = 2.5", "batch_size = 2.5: must be a valid integer"),
        ("max_clips = 'all'", "max_clips = 'all': must be a valid integer"),
        ("dtype = 'float8'", "must be 'float32' or 'bfloat16'"),
        ("evaluate = 3", "must be a table with the fields of EvaluateConfig"),
        ("a = = 3", "is not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_in_a_sentence(tmp_path, text, complaint):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        load_recipe(path, EvaluateConfig)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "student = 's'\n[schedule]\nwarmup = 3",
            r"has no field schedule\.warmup \(did you mean warm_up\?\)",
        ),
        ("student = 's'\n[schedule]\npeak = 3", r"has no schedule\.warm_up"),
        ("student = 's'\nbetas = [0.9]", r"has no betas\[1\]"),
        (
            "student = 's'\nlayers = 'two'",
            r"layers\.int = 'two': must be a valid integer; .*layers\.tuple.*array",
        ),
        ("student = 's'\n[more]\npeak = 'x'", r"more\.peak = 'x': must be a valid number"),
    ],
)
def test_nested_and_alternative_types_are_checked_too(tmp_path, text, complaint):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        load_recipe(path, DistillConfig)


def test_the_line_of_each_problem_is_named(tmp_path):
    """Of the field, else of the table that lacks it; of the right one of several tables."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        """# models = 3
[evaluate]
models = ["a"]
"max-clips" = "all"

[[evaluate.data]]
source = "x"  # [1]

[[evaluate.data]]
split = "test"

[distill]
more.warm_up = 2.5

[destill]
"""
    )
    with pytest.raises(InputError, match="line 15 has no stage destill"):
        load_recipe(path, EvaluateConfig)
    path.write_text(path.read_text().replace("[destill]", ""))
    with pytest.raises(InputError) as error:
        load_recipe(path, EvaluateConfig)
    assert "line 4 [evaluate] max_clips = 'all'" in str(error.value)
    assert "line 9 [evaluate] has no data[1].source" in str(error.value)
    with pytest.raises(InputError, match=r"line 13 \[distill\] more.warm_up = 2.5: must be"):
        load_recipe(path, DistillConfig)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml cannot be read.* are base-6-2, large-v2"):
        load_recipe(tmp_path / "none.toml", EvaluateConfig)


def test_published_recipes_have_names(tmp_path, monkeypatch):
    """Wherever the package is installed; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    for name in ("large-v2-32-2", "large-v2-32-2.toml", "recipes/large-v2-32-2.toml"):
        assert recipe_stages(name)[0] == "pseudo-label"
    (tmp_path / "large-v2-32-2.toml").write_text("[evaluate]\n")
    assert recipe_stages("large-v2-32-2.toml") == ("evaluate",)
    with pytest.raises(InputError, match="cannot be read"):
        recipe_stages("other/large-v2-32-2.toml")


def test_stages_are_named_after_their_verbs():
    assert stage_name(EvaluateConfig) == "evaluate"
    assert stage_name(type("PseudoLabelConfig", (), {})) == "pseudo-label"


def test_all_problems_of_a_file_are_named_at_once(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("betas = [1, 'x']\nlimit = 2.5\n[schedule]\nwarmup = 3\npeak = true\n[mor]\n")
    with pytest.raises(InputError) as error:
        load_recipe(path, DistillConfig)
    for complaint in (
        "no field mor (did you mean more?)",
        "betas[1] = 'x': must be a valid number",
        "limit = 2.5: must be a valid integer",
        "has no schedule.warm_up",
        "has no field schedule.warmup (did you mean warm_up?)",
        "schedule.peak = True: must be a valid number",
    ):
        assert complaint in str(error.value)
