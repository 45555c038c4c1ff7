"""Scripted stages: each runs once, kills and failures included."""

import json

import pytest

from flax_distil import cli
from flax_distil.config import EvaluateConfig
from flax_distil.errors import InputError, SomeFailed, Stopped
from flax_distil.recipe import load_recipe
from flax_distil.sweep import run, stages
from flax_distil.sweep.points import make_plan
from flax_distil.sweep.stages import remaining_seconds, task_options

WER = "filter.max_wer = [1, 5, 10]"


def test_a_killed_sweep_continues_and_every_stage_runs_once(sweep, script):
    config = sweep("filter.max_wer = [5, 10]\ninit-student.decoder_layers = [1, 2]")
    script.killed_at = "max_wer=5/distill"
    with pytest.raises(KeyboardInterrupt):
        run(config)
    before = list(script.ran)
    assert before[-1] == "max_wer=5/filter"
    script.killed_at = ""
    assert run(config) is not None
    assert script.ran[len(before)] == "max_wer=5/distill"
    assert len(script.ran) == len(set(script.ran)) == len(make_plan(config).stages) == 14
    run(config)
    assert len(script.ran) == 14


def test_a_value_that_is_added_later_runs_alone(sweep, script):
    run(sweep("filter.max_wer = [5, 10]"))
    script.ran.clear()
    run(sweep("filter.max_wer = [5, 10, 20]"))
    assert set(script.ran) == {
        f"max_wer=20/{n}" for n in ("filter", "distill", "export", "evaluate")
    }


def test_a_failed_run_is_recorded_and_the_others_go_on(sweep, script, capsys, tmp_path):
    config = sweep(WER)
    assert (
        cli.main(["sweep", "--recipe", str(config.recipe), "--output-dir", str(tmp_path / "out")])
        == 1
    )
    message = "1 of 3 runs failed (max_wer=1): see"
    assert message in capsys.readouterr().err
    record = json.loads((tmp_path / "out/max_wer=1/filter.json").read_text())
    assert record["error"] == "filter: none of 100 labels is kept"
    assert {"base/evaluate", "max_wer=5/evaluate"} < set(script.ran)
    assert "max_wer=1/distill" not in script.ran
    script.ran.clear()
    with pytest.raises(SomeFailed):
        run(config)
    assert script.ran == ["max_wer=1/filter"]  # is tried again


def test_any_error_fails_its_run_alone(sweep, script, monkeypatch):
    def breaks(config):
        if config.output_dir.parent.name == "kl=0":
            raise FloatingPointError("loss is nan")
        return script(config)

    monkeypatch.setattr(stages, "execute", breaks)
    with pytest.raises(SomeFailed, match=r"1 of 2 runs failed \(kl=0\)"):
        run(sweep("distill.loss.kl = [0.0]"))


def test_changed_settings_are_refused_before_anything_runs(sweep, script, tmp_path):
    config = sweep(WER.replace("1, ", ""))
    run(config)
    script.ran.clear()
    text = config.recipe.read_text()
    config.recipe.write_text(text.replace('["clean.jsonl", ', '["other.jsonl", '))
    with pytest.raises(
        InputError, match=r"base/teacher was made with another recipe: datasets \(was"
    ):
        run(config)
    assert not script.ran
    config.recipe.write_text(text.replace("[distill]", "[distill.run]\nlog_every = 9\n[distill]"))
    run(config)  # how it is logged does not matter
    assert not script.ran
    config.recipe.write_text(text.replace("resamples = 200", "resamples = 100"))
    for kind in ("teacher", "evaluate"):
        for record in (tmp_path / "out").glob(f"*/{kind}.json"):
            record.unlink()  # as the message says
    run(config)
    assert script.ran == ["base/teacher", "base/evaluate", "max_wer=5/evaluate"]


def test_a_dry_run_prints_the_folders_and_runs_nothing(sweep, script, capsys, tmp_path):
    run(sweep(WER, "--dry-run"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 runs of 14 stages, 0 of them done" in printed
    assert not script.ran
    assert not (tmp_path / "out").exists()


def test_a_run_s_recipe_is_that_of_its_stages(sweep, script, tmp_path):
    config = sweep(WER.replace("1, ", ""))
    run(config)
    judge = load_recipe(tmp_path / "out/max_wer=5/recipe.toml", EvaluateConfig)
    assert judge == make_plan(config).runs[1].evaluation
    assert judge.models == (str(tmp_path / "out/max_wer=5/export"),)


def test_a_sweep_ends_where_training_is_asked_to_stop(sweep, script, monkeypatch):
    def stops(config):
        if config.output_dir.name == "distill":
            raise Stopped("at update 2")
        return script(config)

    monkeypatch.setattr(stages, "execute", stops)
    with pytest.raises(Stopped):
        run(sweep(WER))
    assert script.ran == ["base/filter", "base/init-student"]


def test_the_time_that_is_left_is_estimated_by_kind(sweep):
    every = list(make_plan(sweep("filter.max_wer = [10]")).stages.values())
    assert [one.kind for one in every[2:]] == ["distill", "export", "teacher", "evaluate"]
    assert remaining_seconds(every[2:], {}) == 0
    done = {"filter": [1.0, 3.0], "distill": [50.0]}
    assert remaining_seconds(every[2:], done) == 50 + 3 * 18


def test_a_task_takes_a_machine_of_the_cluster():
    def nodes(**resources):
        return [{"Resources": {"CPU": 8.0}}, {"Resources": resources}]

    assert task_options(nodes(CPU=96.0, TPU=4.0)) == {"resources": {"TPU": 4}}
    assert task_options(nodes(GPU=8.0, CPU=64.0)) == {"num_gpus": 8}
    assert task_options(nodes(GPU=8.0), 2) == {"num_gpus": 2}
    assert task_options(nodes(CPU=16.0)) == {"num_cpus": 16}
