"""Runs and stages of a sweep: combinations, folders, what is shared."""

from pathlib import Path

import pytest

from flax_distil.config import DistillConfig, EvaluateConfig, ExportConfig, FilterConfig
from flax_distil.errors import InputError
from flax_distil.sweep.points import make_plan

WER, LAYERS = "filter.max_wer = [5, 10, 'None']", "init-student.decoder_layers = [1, 2, [0, 5]]"


def test_one_at_a_time_changes_one_value_of_the_recipe(sweep):
    plan = make_plan(sweep(f"{WER}\n{LAYERS}"))
    assert [run.name for run in plan.runs] == [
        "base",
        "max_wer=5",
        "max_wer=None",
        "decoder_layers=1",
        "decoder_layers=0+5",
    ]
    assert plan.runs[0].values == {"max_wer": "10", "decoder_layers": "2"}
    assert plan.runs[4].values == {"max_wer": "10", "decoder_layers": "0+5"}
    assert [axis.numeric for axis in plan.axes] == [True, False]


def test_the_recipe_s_value_is_a_run_even_where_it_is_not_listed(sweep):
    plan = make_plan(sweep("distill.loss.kl = [0.0, 1.6]"))
    assert [run.values["kl"] for run in plan.runs] == ["0.8", "0", "1.6"]


def test_a_grid_has_all_combinations_of_the_listed_values(sweep):
    plan = make_plan(sweep(f"{WER}\n{LAYERS}", "--design", "grid"))
    assert len(plan.runs) == len({run.name for run in plan.runs}) == 9
    assert plan.runs[0].name == "base"
    other = make_plan(sweep("distill.loss.kl = [0.0, 1.6]", "--design", "grid"))
    assert [run.name for run in other.runs] == ["kl=0", "kl=1.6"]


def test_stages_that_runs_have_in_common_are_the_same_folder(sweep, tmp_path):
    """3 filters, 3 students, 9 runs of three stages, and the teacher."""
    plan = make_plan(sweep(f"{WER}\n{LAYERS}", "--design", "grid"))
    kinds = [stage.kind for stage in plan.stages.values()]
    counts = {kind: kinds.count(kind) for kind in kinds}
    assert counts == {
        "filter": 3, "init-student": 3, "distill": 9, "export": 9, "teacher": 1, "evaluate": 9,
    }  # fmt: skip
    run = next(run for run in plan.runs if run.name == "max_wer=5,decoder_layers=1")
    folders = {kind: stage.config.output_dir for kind, stage in run.stages.items()}
    out = tmp_path / "out"
    assert folders["filter"] == out / "max_wer=5" / "filter"
    assert folders["init-student"] == out / "decoder_layers=1" / "init-student"
    assert folders["teacher"] == out / "base" / "teacher"
    assert folders["distill"] == out / run.name / "distill"


def test_stages_read_each_other_by_the_recipe_s_paths(sweep, tmp_path):
    plan = make_plan(sweep(f"{WER}\n{LAYERS}"))
    out, run = tmp_path / "out", plan.runs[1]
    stages = {kind: stage.config for kind, stage in run.stages.items()}
    train, export, judge = stages["distill"], stages["export"], stages["evaluate"]
    assert isinstance(train, DistillConfig)
    assert train.labels == (out / "max_wer=5/filter/a", Path("other"))
    assert train.student == str(out / "base/init-student")
    assert train.teacher == "whisper-base"
    assert train.run.resume == "auto"
    assert isinstance(export, ExportConfig)
    assert export.source == str(out / "max_wer=5/distill")
    assert isinstance(judge, EvaluateConfig)
    assert judge.models == (str(out / "max_wer=5/export"),)  # in the run's folder, in the recipe
    assert judge.names == ("max_wer=5",)
    teacher = stages["teacher"]
    assert isinstance(teacher, EvaluateConfig)
    assert (teacher.models, teacher.datasets) == (("whisper-base",), judge.datasets)
    needs = [path.relative_to(out).as_posix() for path in run.stages["distill"].needs]
    assert needs == ["max_wer=5/filter.json", "base/init-student.json"]
    assert isinstance(stages["filter"], FilterConfig)
    assert (stages["filter"].max_wer, stages["filter"].source) == (5.0, Path("labels"))


def test_labels_that_nothing_changes_stay_where_the_recipe_has_them(sweep, tmp_path):
    label = '[pseudo-label]\nmodel = "whisper-base"\noutput_dir = "labels"\ndata.source = "x"\n'
    recipe = label + (sweep("a = 1").recipe.read_text().partition("[sweep.fields]")[0])
    plan = make_plan(sweep(WER, recipe=recipe))
    assert plan.runs[1].stages["pseudo-label"].config.output_dir == Path("labels")
    plan = make_plan(sweep("pseudo-label.beams = [5]", recipe=recipe))
    folder = tmp_path / "out" / "beams=5" / "pseudo-label"
    chosen = plan.runs[1].stages["filter"].config
    assert isinstance(chosen, FilterConfig)
    assert chosen.source == plan.runs[1].stages["pseudo-label"].config.output_dir == folder


def test_fields_that_change_together_are_named_sets(sweep):
    sets = """[sweep.fields.objective]
PL = { "distill.loss.kl" = 0.0 }
"PL + KL" = { "distill.loss.kl" = 0.8 }
"PL + KL + MSE" = { "distill.loss.mse" = 1.0 }
"""
    plan = make_plan(sweep(sets))
    assert [run.name for run in plan.runs] == ["base", "objective=PL", "objective=PL_+_KL_+_MSE"]
    assert plan.runs[0].values == {"objective": "PL + KL"}
    losses = [run.stages["distill"].config for run in plan.runs]
    assert [(one.loss.kl, one.loss.mse) for one in losses if isinstance(one, DistillConfig)] == [
        (0.8, 0.0), (0.0, 0.0), (0.8, 1.0),
    ]  # fmt: skip


def test_seeds_of_two_stages_have_their_full_names(sweep):
    plan = make_plan(sweep("distill.seed = [0, 1]\nevaluate.seed = [0, 1]"))
    assert [axis.name for axis in plan.axes] == ["distill.seed", "evaluate.seed"]
    kinds = [stage.kind for stage in plan.stages.values()]
    assert (kinds.count("teacher"), kinds.count("distill"), kinds.count("evaluate")) == (2, 2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", r"has no \[sweep.fields\]: name fields"),
        ("filter.max_wre = [5]", r"no field max_wre \(did you mean max_wer or"),
        ("filter.max_wer = ['x']", r"\[filter\] .*max_wer.*must be a valid number"),
        ("filter.max_wer = 5", "give a list of values to a field"),
        ("filter.max_wer = []", "give a list of values to a field"),
        ("fliter.max_wer = [5]", "give a list of values to a field"),
        ("pseudo-label.beams = [5]", "which is no field of a table of the recipe: filter, init-st"),
        (
            '[sweep.fields.x]\n"a/b" = {}\n"a_b" = {}',
            "two values whose folders would have the same",
        ),
        ("distill.optimizer.steps.x = [1]", r"optimizer.steps = .*must be a valid integer"),
        ("distill.data.0.weight = [1.0]", "data = .*must be a valid array"),
        ('"a.b" = [1]', "has a.b, which is no field of a table"),
    ],
)
def test_fields_that_cannot_be_swept_are_named(sweep, fields, message):
    with pytest.raises(InputError, match=message):
        make_plan(sweep(fields))


def test_a_field_of_one_of_several_tables_has_its_number(sweep):
    recipe = sweep("a = 1").recipe.read_text().partition("[sweep.fields]")[0]
    tables = "".join(f'[[distill.data]]\nsource = "{name}"\n' for name in "ab")
    plan = make_plan(sweep("distill.data.1.weight = [0.5]", recipe=recipe + tables))
    weights = [
        [one.weight for one in run.stages["distill"].config.data]  # type: ignore[union-attr]
        for run in plan.runs
    ]
    assert weights == [[None, None], [None, 0.5]]


def test_a_field_that_changes_no_result_is_refused(sweep):
    """The labels are not those of the filter, so that λ changes nothing."""
    recipe = sweep("a = 1").recipe.read_text().partition("[sweep.fields]")[0]
    apart = recipe.replace("runs/filtered/a", "runs/else")
    with pytest.raises(InputError, match=r"max_wer changes nothing that \[evaluate\] measures"):
        make_plan(sweep(WER, recipe=apart))
    for old, new, message in (
        ("runs/distill/student", "elsewhere", "names 0 models that a stage of the recipe makes"),
        ("resamples = 200", 'assistant = "x"', "1 models .* and an assistant"),
        ("[export]", "[transcribe]", r"has no table \[export\]"),
    ):
        broken = recipe.replace(f'models = ["whisper-base", "{old}"]', f'models = ["{new}"]')
        with pytest.raises(InputError, match=message):
            make_plan(sweep(WER, recipe=broken if broken != recipe else recipe.replace(old, new)))
