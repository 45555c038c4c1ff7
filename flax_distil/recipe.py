"""TOML recipes to and from the dataclasses of `flax_distil.config`.

A recipe holds the fields of one stage, or a table a stage (`[distill]`), so that one file can hold
a whole run. A field that is not written keeps its default; `"None"` is no value, as on the command
line. Relative paths start at the current folder.
"""

import dataclasses
import difflib
import re
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomlkit
import tomlkit.exceptions

from flax_distil.errors import InputError
from flax_distil.files import write_changed

Config = TypeVar("Config")

STAGES = (
    "fetch",
    "pseudo-label",
    "filter",
    "init-student",
    "distill",
    "runs",
    "evaluate",
    "export",
    "transcribe",
    "plan",
    "demo",
)


def load_recipe(path: str | Path, cls: type[Config]) -> Config:
    """The stage `cls` as the recipe at `path` sets it.

    Raises:
        InputError: the file cannot be read, has an unknown key, a value of another type, or lacks
            a field without a default.
    """
    return _built(str(path), cls, recipe_values(path, cls))


def recipe_values(path: str | Path, cls: type) -> dict[str, Any]:
    """The fields of `cls` that a recipe sets, converted to their types; see `load_recipe`."""
    stage = stage_name(cls)
    tables = _read(path)
    if stage in tables:
        _check_names(f"{path}", list(tables), STAGES, "stage")
        return _typed_fields(f"{path} [{stage}]", tables[stage], cls)
    others = [name for name in tables if name in STAGES]
    names = {field.name.replace("_", "-") for field in _fields(cls)}
    if others and not names.issuperset(tables):
        raise InputError(f"{path} has no table [{stage}]; it has {', '.join(others)}")
    return _typed_fields(str(path), tables, cls)


def recipe_stages(path: str | Path) -> tuple[str, ...]:
    """The stages that a recipe has a table for.

    Raises:
        InputError: the file cannot be read.
    """
    return tuple(name for name in _read(path) if name in STAGES)


def save_recipe(config: Any, path: str | Path) -> None:
    """Write every field of a stage, under its table, so that `load_recipe` gives an equal one.

    Other stages' tables that are in the file already stay. The file is replaced whole, or left
    alone where nothing in it changes. Raises InputError for what TOML cannot hold.
    """
    path, stage = Path(path), stage_name(type(config))
    document = tomlkit.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    document[stage] = _plain(config)
    text = tomlkit.dumps(document)
    if odd := re.search("[\ud800-\udfff].*", text):
        raise InputError(f"{path} cannot hold a name that is no UTF-8 ({odd[0]!a}): rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_changed(path, text)


def stage_name(cls: type) -> str:
    """The verb and recipe table of a stage: `PseudoLabelConfig` is pseudo-label."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__.removesuffix("Config")).lower()


def _read(path: str | Path) -> dict[str, Any]:
    """A recipe's tables and fields, named as on the command line."""
    try:
        document = tomlkit.parse(Path(path).read_text(encoding="utf-8")).unwrap()
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (tomlkit.exceptions.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is no TOML: {error}") from None
    return {name.replace("_", "-"): table for name, table in document.items()}


def _plain(value: Any) -> Any:
    """A value in TOML's own types."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in _fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if value is None or isinstance(value, Path) else value


def _built(where: str, cls: type[Config], values: dict[str, Any]) -> Config:
    lacking = [
        field.name
        for field in _fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    if lacking:
        raise InputError(f"{where} has no {', '.join(lacking)}: {cls.__name__} needs it")
    return cls(**values)


def _typed_fields(where: str, table: Any, cls: type) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise InputError(f"{where} = {table!r} must be a table with the fields of {cls.__name__}")
    table = {key.replace("-", "_"): value for key, value in table.items()}
    hints = get_type_hints(cls)
    for name, several in _several(cls).items():
        if isinstance(table.get(name), list) and table[name]:
            table = table | {name: table[name][0], several: table[name]}
    _check_names(where, list(table), [field.name for field in _fields(cls)], "field")
    return {key: _typed(f"{where} {key}", value, hints[key]) for key, value in table.items()}


def _several(cls: type) -> dict[str, str]:
    """Fields that may be a list of tables in a recipe, and the field that takes them all."""
    pairs = ((field.name, field.metadata.get("several")) for field in _fields(cls))
    return {name: several for name, several in pairs if several}


def _typed(where: str, value: Any, hint: Any) -> Any:
    """`value`, as TOML gave it, as the type `hint`; a number may stand where a float is asked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _typed_union(where, value, args)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _built(where, hint, _typed_fields(where, value, hint))
    if hint is type(None) and value == "None":
        return None
    if origin is Literal and any(value == one and type(value) is type(one) for one in args):
        return value
    if origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            return tuple(_typed(where, item, kind) for item, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(f"{where}.{key}", item, args[1]) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Any or type(value) is hint:
        return value
    raise InputError(f"{where} = {value!r} is {_kind(value)}; it must be {_described(hint)}")


def _typed_union(where: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """The first kind that fits, no value before all others."""
    some = [kind for kind in kinds if kind is not type(None)]
    if len(some) == 1 and value != "None":  # the complaint is then about this kind's own content
        return _typed(where, value, some[0])
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):
        try:
            return _typed(where, value, kind)
        except InputError:
            continue
    wanted = " or ".join(_described(kind) for kind in kinds)
    raise InputError(f"{where} = {value!r} is {_kind(value)}; it must be {wanted}")


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "true or false", list: "a list", dict: "a table"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _described(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        inner = args[:1] if args[-1] is ... else args
        return f"a list of {', '.join(_described(kind) for kind in inner)}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a table"
    words = {str: "a text", Path: "a path", bool: "true or false", int: "a whole number"}
    return (words | {float: "a number", type(None): '"None"'}).get(hint, str(hint))


def _check_names(where: str, names: list[str], known: Any, kind: str) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    hints = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=2)
        hints.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name)
    raise InputError(f"{where} has no {kind} {', '.join(hints)}; there is {', '.join(known)}")


def _fields(cls: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)
