"""TOML recipes to and from the dataclasses of `flax_distil.config`.

A recipe holds the fields of one stage, or a table per stage (`[distill]`), so that one file can
describe a whole run. A field that is left out keeps its default; `"None"` means no value, as on the
command line. Relative paths start at the current folder.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomlkit
import tomlkit.exceptions
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn
from cattrs.preconf.tomlkit import make_converter

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
        InputError: the file cannot be read, or has unknown keys, values of a wrong type, or lacks
            fields without a default; the message names all of them.
    """
    values = recipe_values(path, cls)
    missing = [name for name in _required(cls) if name not in values]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}: {cls.__name__} needs it")
    return cls(**values)


def recipe_values(path: str | Path, cls: type) -> dict[str, Any]:
    """The fields of `cls` that a recipe sets, converted to their types; see `load_recipe`."""
    stage, tables, where = stage_name(cls), _read(path), str(path)
    if stage in tables:
        if unknown := [name for name in tables if name not in STAGES]:
            raise InputError(f"{path} has no stage {_suggest(unknown, STAGES)}")
        table, where = tables[stage], f"{path} [{stage}]"
    else:
        table = tables
        others = [name for name in tables if name in STAGES]
        names = {field.name.replace("_", "-") for field in dataclasses.fields(cls)}
        if others and not names.issuperset(tables):
            raise InputError(f"{path} has no table [{stage}]; it has {', '.join(others)}")
    if not isinstance(table, dict):
        raise InputError(f"{where} = {table!r} must be a table with the fields of {cls.__name__}")
    table = _several(cls, {key.replace("-", "_"): value for key, value in table.items()})
    hints, values, problems = get_type_hints(cls), {}, []
    unknown = [name for name in table if name not in hints]
    if unknown:
        problems.append(f"{where} has no field {_suggest(unknown, hints)}")
    for name in table.keys() - unknown:
        try:
            values[name] = _CONVERTER.structure(table[name], hints[name])
        except (ValueError, ExceptionGroup) as error:
            problems += _problems(error, f"{where} {name}")
    if problems:
        raise InputError("; ".join(sorted(problems)))
    return values


def recipe_stages(path: str | Path) -> tuple[str, ...]:
    """The stages that a recipe has a table for. Raises InputError: the file cannot be read."""
    return tuple(name for name in _read(path) if name in STAGES)


def save_recipe(config: Any, path: str | Path) -> None:
    """Write every field of a stage, under its table, so that `load_recipe` gives an equal one.

    Tables of other stages stay in the file. It is replaced whole, or left alone where nothing
    changes. Raises InputError for what TOML cannot hold.
    """
    path, stage = Path(path), stage_name(type(config))
    document = tomlkit.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    document[stage] = _CONVERTER.unstructure(config)
    text = tomlkit.dumps(document)
    if odd := re.search("[\ud800-\udfff].*", text):
        raise InputError(f"{path} cannot hold a name that is not UTF-8 ({odd[0]!a}): rename it")
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
        raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
    return {name.replace("_", "-"): table for name, table in document.items()}


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def _several(cls: type, table: dict[str, Any]) -> dict[str, Any]:
    """A field may be a list of tables, of which another field then takes all."""
    for field in dataclasses.fields(cls):
        several, given = field.metadata.get("several"), table.get(field.name)
        if several and isinstance(given, list) and given:
            table = table | {field.name: given[0], several: given}
    return table


def _problems(error: BaseException, where: str) -> Iterator[str]:
    """A sentence for each thing that is wrong in a value."""
    if isinstance(error, ClassValidationError):
        fields, others = error.group_exceptions()
        for one, note in fields:
            if isinstance(one, KeyError):
                yield f"{where} has no {note.name}: {error.cl.__name__} needs it"
            else:
                yield from _problems(one, f"{where}.{note.name}")
        for one in others:
            yield from _problems(one, where)
    elif isinstance(error, IterableValidationError):
        for one, note in error.group_exceptions()[0]:
            yield from _problems(one, f"{where}[{note.index}]")
    elif isinstance(error, ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        yield f"{where} has no field {_suggest(sorted(error.extra_fields), known)}"
    else:
        yield f"{where} {error}"


def _suggest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Unknown names, each with close matches, and the names that exist."""
    known, hints = list(known), []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=2)
        hints.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name)
    return f"{', '.join(hints)}; there is {', '.join(known)}"


def _wrong(value: Any, hint: Any) -> ValueError:
    kinds = {str: "a text", bool: "true or false", list: "a list", dict: "a table"}
    kind = kinds.get(type(value), f"of type {type(value).__name__}")
    return ValueError(f"= {value!r} is {kind}; it must be {_described(hint)}")


def _described(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, args))
    if origin is tuple:
        inner = args[:1] if args[-1] is ... else args
        return f"a list of {', '.join(_described(kind) for kind in inner)}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a table"
    words = {str: "a text", Path: "a path", bool: "true or false", int: "a whole number"}
    return (words | {float: "a number", type(None): '"None"'}).get(hint, str(hint))


def _structure_union(value: Any, hint: Any) -> Any:
    """The first type that fits, no value before all others."""
    kinds = get_args(hint)
    some = [kind for kind in kinds if kind is not type(None)]
    if value == "None" and len(some) < len(kinds):
        return None
    if len(some) == 1:  # a complaint is then about this type's own content
        return _CONVERTER.structure(value, some[0])
    for kind in some:
        try:
            return _CONVERTER.structure(value, kind)
        except (ValueError, ExceptionGroup):
            continue
    raise _wrong(value, hint)


def _structure_tuple(value: Any, hint: Any) -> tuple[Any, ...]:
    kinds = get_args(hint)
    if not isinstance(value, list) or (kinds[-1] is not ... and len(kinds) != len(value)):
        raise _wrong(value, hint)
    if kinds[-1] is ...:
        return tuple(_CONVERTER.structure(value, list[kinds[0]]))
    return tuple(_CONVERTER.structure(one, kind) for one, kind in zip(value, kinds, strict=True))


def _structure_literal(value: Any, hint: Any) -> Any:
    if any(value == one and type(value) is type(one) for one in get_args(hint)):
        return value
    raise _wrong(value, hint)


def _structure_scalar(value: Any, hint: Any) -> Any:
    """`value` unchanged; a whole number may stand where a number is asked for."""
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (str if hint is Path else hint):
        raise _wrong(value, hint)
    return Path(value) if hint is Path else value


def _structure_table(cls: type) -> Callable[[Any, Any], Any]:
    structure = make_dict_structure_fn(cls, _CONVERTER, _cattrs_forbid_extra_keys=True)

    def from_table(value: Any, hint: Any) -> Any:
        if not isinstance(value, dict):
            raise _wrong(value, hint)
        return structure({key.replace("-", "_"): one for key, one in value.items()}, hint)

    return from_table


def _has_origin(*origins: Any) -> Callable[[Any], bool]:
    return lambda hint: get_origin(hint) in origins


_CONVERTER = make_converter(forbid_extra_keys=True)
for _kind in (int, float, bool, str, Path):
    _CONVERTER.register_structure_hook(_kind, _structure_scalar)
_CONVERTER.register_structure_hook_func(_has_origin(Union, types.UnionType), _structure_union)
_CONVERTER.register_structure_hook_func(_has_origin(tuple), _structure_tuple)
_CONVERTER.register_structure_hook_func(_has_origin(Literal), _structure_literal)
_CONVERTER.register_structure_hook_factory(dataclasses.is_dataclass, _structure_table)
_CONVERTER.register_unstructure_hook(Path, str)
_CONVERTER.register_unstructure_hook_func(
    _has_origin(Union, types.UnionType),
    lambda value: "None" if value is None else _CONVERTER.unstructure(value),
)
