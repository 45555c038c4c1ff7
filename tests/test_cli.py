import dataclasses
import errno
import inspect
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from flax_distil import cli
from flax_distil.config import DistillConfig, EvaluateConfig, TranscribeConfig
from flax_distil.errors import InputError, SomeFailed
from flax_distil.recipe import load_recipe, save_recipe


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def run_as(monkeypatch, raised: BaseException) -> int:
    def run(_):
        raise raised

    monkeypatch.setattr("flax_distil.cli.import_module", lambda _: type("Room", (), {"run": run}))
    return cli.main(["transcribe", "a.wav", "--model", "m"])


def test_help_names_every_verb_and_each_verb_shows_an_example(capsys):
    overview = help_of(capsys)
    for verb in cli.VERBS:
        assert verb in overview
        assert f"flax-distil {verb} " in help_of(capsys, verb)


def test_unknown_verbs(capsys):
    for verb, near in (("transribe", "transcribe"), ("train", "distill"), ("init", "init-student")):
        assert cli.main([verb, "x"]) == 2
        assert f"no command {verb} (did you mean {near}?)" in capsys.readouterr().err
    for arguments, shown in ((["help"], "subcommands"), (["help", "filter"], "--max-wer")):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert (stop.value.code, shown in capsys.readouterr().out) == (0, True)
    student = cli.parse(["init_student", "--teacher", "a", "--output-dir", "b"])
    assert student.decoder_layers == 2


def test_help_of_fields_with_several_values(capsys):
    shown = help_of(capsys, "evaluate") + help_of(capsys, "transcribe")
    assert "--datasets STR ..." in shown
    assert "--methods {sequential,chunked} ..." in shown
    for ugly in ("[STR", "(default: )", "[PATH", "[FLOAT"):
        assert ugly not in shown


def test_help_does_not_keep_the_line_breaks_of_the_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "so that distill --stored-teacher does" in help_of(capsys, "pseudo-label")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_field_is_explained(verb):
    helps = cli._field_helps(cli.VERBS[verb].config)
    for field in dataclasses.fields(cli.VERBS[verb].config):
        assert helps[field.name], (verb, field.name)
        assert "\n" not in helps[field.name]


def test_every_example_parses():
    for verb, (config, _, example) in cli.VERBS.items():
        assert isinstance(cli.parse([verb, *example.split()]), config)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_room_runs_the_config_of_its_verb(verb):
    config, room, _ = cli.VERBS[verb]
    (parameter,) = inspect.signature(import_module(f"flax_distil.{room}").run).parameters.values()
    assert parameter.annotation is config


def test_flags_override_the_recipe_which_overrides_the_defaults(tmp_path):
    recipe = tmp_path / "run.toml"
    recipe.write_text('[evaluate]\nmodels = ["a", "b"]\nbatch_size = 3\npasses = 5\n')
    stage = cli.parse(["evaluate", f"--recipe={recipe}", "--batch-size", "4", "--datasets", "d"])
    assert stage == EvaluateConfig(("a", "b"), ("d",), batch_size=4, passes=5)


def test_what_neither_recipe_nor_flags_give_is_asked_for(tmp_path, capsys):
    recipe = tmp_path / "run.toml"
    recipe.write_text("[evaluate]\nbatch_size = 3\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--recipe", str(recipe), "--datasets", "a"])
    assert stop.value.code == 2
    assert "--models" in capsys.readouterr().err


def test_a_table_for_each_dataset_of_a_mixture(tmp_path):
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        """[distill]
teacher = "t"
student = "s"
output_dir = "r"

[[distill.data]]
source = "runs/labels"

[[distill.data]]
source = "mozilla-foundation/common_voice_17_0"
config = "de"
streaming = true
language = "de"
weight = 100
"""
    )
    stage = cli.parse(["distill", "--recipe", str(recipe), "--labels", "a", "b", "--lanes", "4"])
    labels, german = stage.data
    assert (labels.source, labels.weight) == ("runs/labels", None)
    assert (german.config, german.language, german.weight, german.streaming) == (
        "de",
        "de",
        100.0,
        True,
    )
    assert (stage.labels, stage.lanes) == ((Path("a"), Path("b")), 4)
    save_recipe(stage, tmp_path / "saved.toml")
    assert load_recipe(tmp_path / "saved.toml", DistillConfig) == stage


def test_audio_files_are_positional():
    stage = cli.parse(["transcribe", "a.wav", "b.wav", "--model", "m", "--format", "json"])
    assert isinstance(stage, TranscribeConfig)
    assert [str(path) for path in stage.audio] == ["a.wav", "b.wav"]


def test_wrong_input_is_one_line_and_status_2(monkeypatch, capsys):
    assert run_as(monkeypatch, InputError("batch 250 does not divide")) == 2
    assert capsys.readouterr().err == "flax-distil: batch 250 does not divide\n"
    assert cli.main(["evaluate", "--recipe", "none.toml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_only_labels_are_written_to_an_address(capsys):
    labels = ["pseudo-label", "clips.jsonl", "--model", "m", "--output-dir", "gs://b/labels"]
    cli.check_paths(cli.parse(labels))
    run = ["distill", "--teacher", "t", "--student", "s"]
    for refused in (
        [*labels, "--audio-states", "gs://b/states"],
        [*run, "--labels", "a", "--output-dir", "gs://b/runs"],
        [*run, "--output-dir", "r", "--validation.labels", "a", "gs://b/heldout.jsonl"],
    ):
        assert cli.main(refused) == 2
        assert f"flax-distil: {refused[-1]} is a URL, and only" in capsys.readouterr().err


def test_partial_failure_is_1_and_an_interrupt_130(monkeypatch):
    assert run_as(monkeypatch, SomeFailed("1 of 2 files failed")) == 1
    assert run_as(monkeypatch, KeyboardInterrupt()) == 130


def test_a_full_disk_is_said(monkeypatch, capsys):
    assert run_as(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/x")) == 2
    assert capsys.readouterr().err == "flax-distil: runs/x: No space left on device\n"
    with pytest.raises(OSError, match="Too many open files"):
        run_as(monkeypatch, OSError(errno.EMFILE, "Too many open files"))


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_as(monkeypatch, ZeroDivisionError())


def test_closed_standard_streams(monkeypatch, tmp_path):
    """A verb ends well without them, and no file takes their numbers."""
    monkeypatch.setattr(sys, "stdout", None)
    room = type("Room", (), {"run": lambda _: print("done")})
    monkeypatch.setattr(cli, "import_module", lambda _: room)
    assert cli.main(["runs", str(tmp_path)]) == 0
    program = (
        "import sys; from flax_distil.cli import open_streams; open_streams(); print('lost');"
        "file = open('kept', 'w'); sys.exit(file.fileno() < 3 or sys.stdin is not None)"
    )
    command = f'"{sys.executable}" -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, check=False).returncode == 0


def test_a_full_disk_behind_version():
    command = f'"{sys.executable}" -m flax_distil.cli --version >/dev/full'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flax-distil 0.")


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; from flax_distil import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'torch', 'transformers', 'datasets', 'av'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The promise is 1.5 s on a free machine; it takes 0.4. A loaded one gets four times that.
    assert time.perf_counter() - start < 6


def test_the_package_exports_its_names_lazily():
    program = (
        "import sys, flax_distil\n"
        "assert not {'jax', 'numpy'} & set(sys.modules)\n"
        "assert flax_distil.InputError.__name__ == 'InputError'\n"
        "assert 'recognize' in dir(flax_distil)\n"
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_there():
    import flax_distil

    for name in flax_distil.__all__:
        assert getattr(flax_distil, name).__name__ == name
        assert not (Path(flax_distil.__file__).parent / name).exists()  # a package of this name
    with pytest.raises(AttributeError, match="nothing"):
        _ = flax_distil.nothing


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed_may_be_odd_or_unread(encoding):
    """A name that is no UTF-8, a script that the terminal lacks; then a pipe that is closed."""
    program = (
        "import sys; from flax_distil import cli\n"
        "class Room:\n"
        "    @staticmethod\n"
        "    def run(stage):\n"
        "        print('caf\\udce9', 'é', '日本', flush=True)\n"
        "        sys.stdin.read(); print('more')\n"
        "cli.import_module = lambda name: Room\n"
        "sys.exit(cli.main(['fetch', 'whisper-base']))"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) as process:
        assert process.stdout.readline().decode(encoding).startswith(r"caf\udce9")
        process.stdout.close()
        process.stdin.close()
        assert (process.wait(60), process.stderr.read()) == (141, b"")
