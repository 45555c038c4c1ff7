"""TOML recipes to and from the dataclasses of `flax_distil.config`, checked by pydantic.

A recipe holds the fields of one stage, or a table per stage (`[distill]`), so that one file can
describe a whole run. A field that is left out keeps its default; `"None"` means no value, as on the
command line. Relative paths start at the current folder.
"""

import dataclasses
import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomlkit
from pydantic import TypeAdapter, ValidationError
from tomlkit.exceptions import ParseError

from flax_distil.errors import InputError
from flax_distil.files import write_changed

Config = TypeVar("Config")

PUBLISHED = Path(__file__).parent / "recipes"
HEADING = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
FIELD = re.compile(r"\s*([\w.\"' -]+?)\s*=")
STAGES = ("fetch", "pseudo-label", "filter", "init-student", "distill", "runs", "evaluate")
STAGES += ("sweep", "export", "transcribe", "plan", "demo")

Recipe = tuple[str, dict[str, Any]]
"""A recipe's text, and its tables and fields by their names."""


def load_recipe(path: str | Path, cls: type[Config], recipe: Recipe | None = None) -> Config:
    """The stage `cls` as the recipe at `path` sets it.

    recipe: what was read from there, perhaps with other values; by default it is read.

    Raises:
        InputError: the file cannot be read, or has unknown keys, values of a wrong type, or lacks
            fields without a default; the message names all of them, with their lines.
    """
    values = recipe_values(path, cls, recipe)
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    unset = [one.name for one in fields if MISSING is one.default is one.default_factory]
    if missing := [name for name in unset if name not in values]:
        raise InputError(f"{path} has no {', '.join(missing)}: {cls.__name__} needs it")
    return cls(**values)


def recipe_values(path: str | Path, cls: type, recipe: Recipe | None = None) -> dict[str, Any]:
    """The fields of `cls` that a recipe sets, converted to their types; see `load_recipe`."""
    stage, (text, tables) = stage_name(cls), recipe or read_recipe(path)
    if stage in tables:
        if unknown := [name for name in tables if name not in STAGES]:
            place = _place(text, [unknown[0]])
            raise InputError(f"{path}{place} has no stage {suggest(unknown[0], STAGES)}")
        table, above, where = tables[stage], [stage], f" [{stage}]"
    elif others := [name for name in tables if name in STAGES]:
        raise InputError(f"{path} has no table [{stage}]; it has {', '.join(others)}")
    else:
        table, above, where = tables, [], ""
    if not isinstance(table, dict):
        raise InputError(
            f"{path}{where} = {table!r} must be a table with the fields of {cls.__name__}"
        )
    table, adapter = _plain(table), _adapter(cls)
    written = {}  # the name in the recipe of a field with another one
    for field in dataclasses.fields(cls):  # may be a list of tables, of which another takes all
        several, given = field.metadata.get("several"), table.get(field.name)
        if several and isinstance(given, list) and given:
            table |= {field.name: given[0], several: given}
            written[several] = field.name
    try:
        stage_values = adapter.validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        schema = adapter.json_schema()
        tables_of = [schema, *schema.get("$defs", {}).values()]
        known = {name for one in tables_of for name in one.get("properties", ())}
        problems = set()
        for one in error.errors():
            loc = [written.get(str(name), name) for name in one["loc"]]
            place, problem = _place(text, [*above, *loc]), _problem(one | {"loc": loc}, known)
            problems.add(f"{path}{place}{where} {problem}")
        raise InputError("; ".join(sorted(problems))) from None
    return {name: value for name, value in vars(stage_values).items() if name in table}


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    """Validates the fields of a stage, of which any may be missing."""
    hints = get_type_hints(cls, include_extras=True)
    optional = [(name, hint, dataclasses.field(default=None)) for name, hint in hints.items()]
    strict = {"__pydantic_config__": {"extra": "forbid"}}
    return TypeAdapter(dataclasses.make_dataclass(cls.__name__, optional, namespace=strict))


def recipe_stages(path: str | Path) -> tuple[str, ...]:
    """The stages that a recipe has a table for. Raises InputError: the file cannot be read."""
    return tuple(name for name in read_recipe(path)[1] if name in STAGES)


def save_recipe(config: Any, path: str | Path) -> None:
    """Write every field of a stage, under its table, so that `load_recipe` gives an equal one.

    Tables of other stages stay in the file. It is replaced whole, or left alone where nothing
    changes. Raises InputError for what TOML cannot hold.
    """
    path, stage = Path(path), stage_name(type(config))
    document = tomlkit.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    fields = dataclasses.asdict(config, dict_factory=_without_none)
    document[stage] = json.loads(json.dumps(fields, default=str))
    text = tomlkit.dumps(document)
    if odd := re.search("[\ud800-\udfff].*", text):
        raise InputError(f"{path} cannot hold a name that is not UTF-8 ({odd[0]!a}): rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_changed(path, text)


def stage_name(cls: type) -> str:
    """The verb and recipe table of a stage: `PseudoLabelConfig` is pseudo-label."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__.removesuffix("Config")).lower()


def read_recipe(path: str | Path) -> Recipe:
    """A recipe's text, and its tables and fields, named as on the command line.

    path: of a file, else the name of a published recipe, with or without `recipes/` and `.toml`.

    Raises InputError: the file cannot be read, or is not TOML.
    """
    path = Path(path)
    published = PUBLISHED / f"{path.name.removesuffix('.toml')}.toml"
    if not path.exists() and str(path.parent) in (".", "recipes") and published.is_file():
        path = published
    try:
        text = path.read_text(encoding="utf-8")
        document = tomlkit.parse(text).unwrap()
    except OSError as error:
        raise InputError(
            f"the recipe {path} cannot be read: {error.strerror}; published recipes are "
            f"{', '.join(sorted(one.stem for one in PUBLISHED.glob('*.toml')))}"
        ) from None
    except (ParseError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
    return text, {name.replace("_", "-"): table for name, table in document.items()}


def _place(text: str, wanted: Sequence[str | int]) -> str:
    """ ", line N" of the field or table at a path in a recipe, or of the table that should have it.

    The fields of the first of several tables may be named without its number.
    """
    plain = lambda name: name.strip(" \"'").replace("-", "_")
    lines: dict[tuple[str, ...], int] = {}
    table, counts = (), defaultdict(int)
    for number, line in enumerate(text.splitlines(), 1):
        if found := HEADING.match(line):
            table = tuple(map(plain, found[2].split(".")))
            lines.setdefault(table, number)
            if found[1] == "[[":
                counts[table] += 1
                table = (*table, str(counts[table] - 1))
                lines[table] = number
        elif found := FIELD.match(line):
            lines.setdefault((*table, *map(plain, found[1].split("."))), number)
    path = tuple(plain(str(one)) for one in wanted)
    near = (path[:length] for length in range(len(path), 0, -1))
    number = next((lines[one] for one in near if one in lines), None)
    return "" if number is None else f", line {number}"


def _plain(value: Any) -> Any:
    """A value of a recipe with the names of fields, and without "None"."""
    if isinstance(value, dict):
        return {key.replace("-", "_"): _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return list(map(_plain, value))
    return None if value == "None" else value


def _without_none(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key: "None" if value is None else value for key, value in items}


def _problem(error: dict[str, Any], known: Iterable[str]) -> str:
    """One of pydantic's errors as a sentence about a field."""
    name = str(error["loc"][-1])
    place = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in error["loc"])[1:]
    if error["type"] == "unexpected_keyword_argument":
        return f"has no field {place.removesuffix(name)}{suggest(name, known)}"
    if error["type"] == "missing":
        return f"has no {place}"
    message = error["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{place} = {error['input']!r}: {message}"


def suggest(unknown: str, known: Iterable[str]) -> str:
    """An unknown name with its close matches."""
    near = difflib.get_close_matches(unknown, known, n=2)
    return f"{unknown} (did you mean {' or '.join(near)}?)" if near else unknown
