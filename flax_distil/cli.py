"""`flax-distil VERB`: verbs are stages, and their flags the fields of the stage's config.

Nothing heavy is imported before the verb is known, so that `--help` is fast.
"""

import dataclasses
import errno
import io
import logging
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro
from docstring_parser import parse_from_object
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from flax_distil import config
from flax_distil.cache import keep_programs
from flax_distil.errors import InputError
from flax_distil.parallel.platform import name_platform
from flax_distil.recipe import recipe_values, stage_name, suggest

INTERRUPTED = 130  # what a shell reports after Ctrl-C
BROKEN_PIPE = 141  # and for a program that writes to a closed pipe
DISK_ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES")


class Verb(NamedTuple):
    """A stage on the command line; `room` is the module whose `run` takes the config."""

    config: type
    room: str
    example: str


LABEL = """openslr/librispeech_asr --config clean --split train.100 --model whisper-base \
--output-dir runs/labels"""
FILTER = "runs/labels --output-dir runs/filtered"
DISTILL = """--teacher whisper-base --student runs/student --labels runs/filtered \
--output-dir runs/distill"""
INIT = "--teacher whisper-base --output-dir runs/student --decoder-layers 2"
EVALUATE = "--models whisper-base runs/student --datasets clips.jsonl podcasts.parquet"
TRANSCRIBE = "talk.mp3 film.mkv --model whisper-base --format srt --output-dir texts"
SWEEP = "--recipe recipes/sweep-tiny-en.toml --dry-run"
PLAN = "recipes/large-v2-32-2.toml --topology v4-8 v5e-256 --batch auto"
VERBS = {
    "fetch": Verb(config.FetchConfig, "fetch", "whisper-tiny.en whisper-base"),
    "pseudo-label": Verb(config.PseudoLabelConfig, "pseudo_label", LABEL),
    "filter": Verb(config.FilterConfig, "pseudo_label.filter", FILTER),
    "init-student": Verb(config.InitStudentConfig, "model.student", INIT),
    "distill": Verb(config.DistillConfig, "distill.trainer", DISTILL),
    "runs": Verb(config.RunsConfig, "distill.runs", "runs --json"),
    "evaluate": Verb(config.EvaluateConfig, "evaluate", EVALUATE),
    "export": Verb(config.ExportConfig, "export", "runs/distill --output-dir student --verify"),
    "sweep": Verb(config.SweepConfig, "sweep", SWEEP),
    "transcribe": Verb(config.TranscribeConfig, "transcription", TRANSCRIBE),
    "plan": Verb(config.PlanConfig, "plan", PLAN),
    "demo": Verb(config.DemoConfig, "demo", "--output-dir runs/demo"),
    "doctor": Verb(config.DoctorConfig, "doctor", "--no-network"),
}

DESCRIPTION = """Distil-Whisper in JAX: label speech with a teacher, train a student, evaluate and \
export it.

Help on a command: flax-distil COMMAND --help. Every command takes --recipe: a TOML file, or the \
name of a published recipe, such as large-v2-32-2; flags override its values. Version: flax-distil \
--version. Completion in the shell: flax-distil --tyro-write-completion bash (zsh, fish) FILE."""
SYNONYMS = {"train": "distill", "label": "pseudo-label", "download": "fetch", "convert": "export"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0: done; 1: some inputs failed; 2: wrong input; 3: a stage was asked to stop, and later ones did
    not run; 130: interrupted; 141: the output is no longer read. Anything else is a bug and keeps
    its traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("flax_distil").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # any text and file name can be printed
    try:
        if arguments == ["--version"]:
            print(f"flax-distil {version('flax-distil')}", flush=True)
            return 0
        stage = parse(arguments)
        check_paths(stage)
        name_platform()
        keep_programs()
        room = VERBS[stage_name(type(stage))].room
        import_module(f"flax_distil.{room}").run(stage)
        sys.stdout.flush()
    except InputError as error:
        print(f"flax-distil: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return BROKEN_PIPE
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in DISK_ERRORS:
            raise
        print(f"flax-distil: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flax-distil: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def open_streams() -> None:
    """Connect closed standard streams to the null device.

    Otherwise the next file that is opened, such as a checkpoint, would take the number of a closed
    stream and receive what libraries print. `sys.stdin` stays None, as code that looks expects.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def parse(arguments: Sequence[str]) -> Any:
    """The config of the verb that the arguments name; exits like any parser on `--help`.

    Raises:
        InputError: there is no such verb, or the recipe cannot be used.
    """
    reader = ArgumentParser(prog="flax-distil", add_help=False, allow_abbrev=False)
    reader.add_argument("--recipe")
    given, arguments = reader.parse_known_args(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    chosen = arguments[0].replace("_", "-") if arguments else "--help"
    if not chosen.startswith("-") and chosen not in VERBS:
        begins = (verb for verb in VERBS if verb.startswith(chosen))
        near = SYNONYMS.get(chosen) or next(begins, None)
        name = f"{chosen} (did you mean {near}?)" if near else suggest(chosen, VERBS)
        raise InputError(f"there is no command {name}: flax-distil --help lists all")
    verbs, values = [], {}
    for name, verb in VERBS.items():
        help = " ".join((verb.config.__doc__ or "").split())
        if name != chosen:
            help = help.partition(". ")[0].removesuffix(".")
        else:
            help += f"\n\nExample: flax-distil {name} {verb.example}"
            if given.recipe is not None:
                values = {verb.config: recipe_values(given.recipe, verb.config)}
                if "recipe" in get_type_hints(verb.config):  # the stage reads other tables too
                    values[verb.config]["recipe"] = Path(given.recipe)
        verbs.append(Annotated[verb.config, tyro.conf.subcommand(name, description=help)])
    return tyro.cli(
        Union[tuple(verbs)],  # type: ignore[arg-type]  # noqa: UP007
        prog="flax-distil",
        description=DESCRIPTION,
        args=arguments,
        registry=_registry(values),
    )


def _registry(values: Mapping[type, Mapping[str, Any]]) -> ConstructorRegistry:
    """How tyro reads dataclasses: field docstrings as one paragraph each, and a recipe's values as
    the defaults of a stage; it asks for what has neither a value nor a default."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
        of_stage = info.type.__module__.startswith("flax_distil.")
        if not (of_stage and dataclasses.is_dataclass(info.type)):
            return None
        hints, helps = get_type_hints(info.type, include_extras=True), _field_helps(info.type)
        given, fields = values.get(info.type, {}), []
        for field in dataclasses.fields(info.type):
            name = field.name
            default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            default = given.get(name, getattr(info.default, name, default))
            hint: Any = hints[name]
            if (metavar := _metavar(hint)) is not None:
                known = default is not tyro.MISSING
                shown = (
                    f"(default: {' '.join(map(str, default)) or 'none'})" if known else "(required)"
                )
                hint = Annotated[hint, tyro.conf.arg(metavar=metavar, help_behavior_hint=shown)]
            fields.append(StructFieldSpec(name, hint, default, helps[name]))
        return StructConstructorSpec(info.type, tuple(fields))

    return registry


def _metavar(hint: Any) -> str | None:
    """How the help shows a field of any number of values; None for other fields."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(hint) is not tuple or get_args(hint)[-1] is not Ellipsis:
        return None
    choices = ",".join(map(str, get_args(get_args(hint)[0])))
    return f"{{{choices}}} ..." if choices else f"{get_args(hint)[0].__name__.upper()} ..."


def _field_helps(cls: type) -> dict[str, str]:
    """Field → its docstring, without the line breaks of the source."""
    classes = filter(dataclasses.is_dataclass, reversed(cls.__mro__))
    fields = [field for one in classes for field in parse_from_object(one).params]
    return {field.arg_name: " ".join((field.description or "").split()) for field in fields}


def check_paths(value: Any) -> None:
    """Raises InputError for a URL where a folder is expected, which would create a folder of that
    name here."""
    if isinstance(value, Path) and re.match("[a-z][a-z0-9+]+:/", str(value)):
        raise InputError(
            f"{str(value).replace(':/', '://', 1)} is a URL, and only pseudo-label's "
            "--output-dir may be one: name the folder where the bucket is mounted"
        )
    inner = value if isinstance(value, tuple) else ()
    if dataclasses.is_dataclass(value):
        allowed = {"output_dir"} if isinstance(value, config.PseudoLabelConfig) else set()
        inner = [one for name, one in vars(value).items() if name not in allowed]
    for one in inner:
        check_paths(one)


if __name__ == "__main__":
    sys.exit(main())
