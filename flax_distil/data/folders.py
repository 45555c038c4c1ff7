"""A folder of files as one table: Parquet, lists of audio, and audio with its texts beside it.

Audio that no list names stays, without text: a list may be of some clips only, and what is to be
labelled needs none. Splits are never mixed: they are told by names of Parquet files, of lists and
of folders, as `datasets` tells them, and not by names of audio files.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pyarrow as pa

from flax_distil.config import DataConfig
from flax_distil.data.cells import cell_seconds
from flax_distil.data.lists import (
    PROBED,
    SURROGATE,
    List,
    audio_base,
    audio_names,
    is_audio,
    list_kind,
    names_audio,
    open_text,
    read_list,
)
from flax_distil.data.parquet import ParquetRows, parquet_footer, read_parquet
from flax_distil.data.table import (
    AUDIO,
    FILE_COLUMNS,
    LANGUAGE,
    RECORDING,
    SPEAKER,
    TEXT,
    Row,
    Table,
)
from flax_distil.errors import InputError

SHARD_NAME = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\.parquet")
# fmt: off
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}
# fmt: on
LIBRISPEECH_NAME = re.compile(r"(?P<chapter>(?P<speaker>\d+)-\d+)-\d+")
SPANS = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))  # seconds
TEXT_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".lab", ".srt", ".vtt", ".stm")
BESIDE = (".txt", ".normalized.txt", ".lab")  # of the file that holds the text of one clip


class Split(NamedTuple):
    """The part of a dataset that a file belongs to."""

    name: str
    kind: str
    """train, validation or test where the name says so, else the name."""
    of_list: bool = False
    """Whether a list is called so: what it does not name is then not of the split."""


def read_folder(folder: Path, config: DataConfig) -> Table:
    """Whatever lies in a folder and below it. Raises InputError like `read_files`."""
    return read_files(sorted(map(Path, _walk(folder))), folder, config)


def read_files(files: Sequence[Path], root: Path, config: DataConfig) -> Table:
    """Files below `root` as one table, of the split that was named.

    Raises InputError for several splits where none is named, a split that is not there, and files
    that hold no clip.
    """
    parquet = [path for path in files if path.suffix == ".parquet"]
    parquet = [path for path in parquet if path.name != "metadata.parquet"] or parquet
    audio = [path for path in files if is_audio(path)]
    if audio:
        parquet = [path for path in parquet if _audio_types(path, config)]
    if parquet and not (audio and all(map(is_text, _audio_types(parquet[0], config)))):
        splits = {path: _split(path, root, config) for path in parquet}
        chosen = _choice(splits.values(), config)
        table = read_parquet([path for path in parquet if chosen(splits[path])], config.source)
        held = not _name(next(iter(table.rows), {}), audio_names(config))
        return _noted(table, len(audio) * held, "audio files beside the Parquet files not read")

    texts = [path for path in files if list_kind(path) and path.is_file()]
    lists = parquet + [path for path in texts if names_audio(path, config)]
    splits = {path: _split(path, root, config) for path in (*lists, *audio)}
    chosen = _choice(splits.values(), config)
    read = [path for path in lists if splits[path] is None or chosen(splits[path])]
    tables = []
    for path in read:
        table = list_table(path, config, root)
        if config.split and splits[path] is None:
            rows = [row for row in table.rows if chosen(_split(Path(_file(row)), root, config))]
            table = replace(table, rows=rows)
        tables.append(table)
    table, beside = _joined(tables), _Beside(files)
    if config.text_column is None:
        table = _with_texts(table, beside)
    alone = [path for path in audio if chosen(splits[path])]
    if alone:
        listed = {os.path.abspath(_file(row)) for row in table.rows}
        alone = [path for path in alone if os.path.abspath(path) not in listed]
    if any(split.of_list for path in read if (split := splits[path])):
        return _noted(table, len(alone), "audio files that the list of this split does not name")
    table = _with_audio(table, alone, beside, root)
    if not table.rows:
        raise InputError(
            f"{config.source} has no Parquet, no list of audio (.csv, .tsv, .jsonl, .json), and no "
            "audio: nothing to read"
        )
    if any(all(row.get(name) is None for name in TEXT) for row in table.rows):
        read = {os.path.abspath(path) for path in lists} | beside.read
        others = [path for path in files if path.suffix in TEXT_SUFFIXES and path.is_file()]
        others = [path for path in others if os.path.abspath(path) not in read]
        if others := [path for path in others if path.stem.lower() not in ("readme", "license")]:
            words = f"text files not read, such as {others[0].relative_to(root)}"
            return _noted(table, len(others), words)
    return table


# --- splits -------------------------------------------------------------------------------------


def _split(path: Path, root: Path, config: DataConfig) -> Split | None:
    """The split that names of folders, or that of a list or Parquet file, tell."""
    if match := SHARD_NAME.fullmatch(path.name):
        name = match["split"]
        return Split(name, SPLITS.get(name, name))
    stem = path.name.partition(".")[0]
    if path.suffix == ".tsv" and (path.parent / "clips").is_dir():  # Common Voice
        return Split(stem, SPLITS.get(stem, stem), of_list=True)
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    if not path.is_relative_to(root):  # a list may name files elsewhere
        return None
    folders = path.relative_to(root).parts[:-1]
    for name in folders:
        if name == config.split or _kind(name):
            return Split(name, _kind(name) or name)
    if not is_audio(path) and (kind := _kind(stem)):
        return Split(stem, kind, of_list=True)
    return None


def _kind(name: str) -> str | None:
    """train, validation or test where a word of the name is one of them."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def check_split(path: Path, config: DataConfig) -> None:
    """Raises InputError where neither a file nor its folder is called after the split asked for."""
    if config.split is not None:
        _choice([_split(path, path.parent.parent, config)], config)


def _choice(splits: Iterable[Split | None], config: DataConfig) -> Callable[[Split | None], bool]:
    """Which splits are read. Raises InputError where that is unclear, or nothing."""
    known = {split for split in splits if split}
    names = ", ".join(sorted({split.name for split in known})) or "none"
    if config.split is None:
        if len({split.kind for split in known}) > 1:
            raise InputError(f"{config.source} has the splits {names}: name one as split")
        return lambda _: True
    asked = {split for split in known if split.name == config.split}
    kind = SPLITS.get(config.split, config.split)
    asked = asked or {split for split in known if split.kind == kind}
    if not asked:
        raise InputError(f"{config.source} has no split {config.split}; it has {names}")
    return lambda split: split in asked


# --- lists --------------------------------------------------------------------------------------


def list_table(path: Path, config: DataConfig, root: Path | None = None) -> Table:
    """The rows of a list; relative names of files start at its folder, or where they are found.

    Ids are the names as they are written, the same on every machine; below `root`, from there.
    """
    if path.suffix == ".parquet":
        found = List(list(ParquetRows([path])))
    else:
        found = read_list(path, config)
    if not found.rows and root is None:
        raise InputError(f"{path} has no rows")
    columns = dict.fromkeys(chain(("id",), *found.rows))
    usual = dict.fromkeys((*audio_names(config), *FILE_COLUMNS))
    names = [name for name in usual if name in columns]
    if _cut(found, names):
        columns.update(offset=None, duration=None)
    written = (name for row in found.rows if _is_relative(name := _name(row, names)))
    base, suffix = audio_base(path.parent, list(islice(written, PROBED)))
    above = path.parent.relative_to(root).as_posix() + "/" if root else "./"
    for row in found.rows:
        name = _name(row, names)
        if row.get("id") is None and name:
            name = name if above == "./" or not _is_relative(name) else above + name
            row["id"] = name if row.get("offset") is None else f"{name}@{row['offset']}"
        for column in names:
            value = row.get(column)
            if isinstance(value, dict) and _is_relative(value.get("path")):
                row[column] = {**value, "path": os.path.join(base, value["path"] + suffix)}
            elif _is_relative(value):
                row[column] = os.path.join(base, value + suffix)
        if names and row.get(names[0]) is None:  # a list whose rows name it differently
            row[names[0]] = _name(row, names)
    return Table(tuple(columns), found.rows, found.notes())


def _cut(found: List, columns: Sequence[str]) -> bool:
    """Whether rows name one file several times, with start and end: they become clips of it."""
    if any("offset" in row for row in found.rows):
        return False
    for start, end in SPANS:
        files = [_name(row, columns) for row in found.rows if start in row and end in row]
        if len(set(files)) < len(files):
            for row in found.rows:
                first, last = cell_seconds(row.get(start)), cell_seconds(row.get(end))
                if first is not None and last is not None and first < last:
                    row["offset"], row["duration"] = first, last - first
            return True
    return False


def _name(row: Row, columns: Iterable[str]) -> str | None:
    """The first file that a row names and does not hold."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, dict):
            value = None if value.get("bytes") else value.get("path")
        if isinstance(value, str) and value:
            return value
    return None


def _file(row: Row) -> str:
    return _name(row, (*AUDIO, *row)) or ""


def _is_relative(name: Any) -> TypeGuard[str]:
    return isinstance(name, str) and name != "" and "://" not in name and not os.path.isabs(name)


def _joined(tables: Sequence[Table]) -> Table:
    """Lists one after the other, under the columns of the first; what is listed twice, once."""
    columns: dict[str, None] = {}
    if len(tables) == 1:
        return tables[0]
    rows: dict[Any, Row] = {}
    twice = 0
    for number, table in enumerate(tables):
        other_names = _other_names(columns, table.columns)
        columns.update(dict.fromkeys(other_names.get(name, name) for name in table.columns))
        before = set(rows)
        for place, row in enumerate(table.rows):
            row = {other_names.get(name, name): value for name, value in row.items()}
            clip = (os.path.abspath(_file(row)), row.get("offset"))
            if clip in before:
                twice += 1
                rows[clip].update({k: v for k, v in row.items() if rows[clip].get(k) is None})
            else:
                rows[clip if clip not in rows else (clip, number, place)] = row
    notes = tuple(note for table in tables for note in table.notes)
    return _noted(Table(tuple(columns), list(rows.values()), notes), twice, "clips listed twice")


def _other_names(columns: Iterable[str], others: Sequence[str]) -> dict[str, str]:
    """Columns of another list → those that hold the same in the lists before it."""
    names = {}
    for usual in (AUDIO, TEXT, SPEAKER, LANGUAGE, RECORDING):
        here = next((name for name in usual if name in columns), None)
        there = next((name for name in usual if name in others), None)
        if here and there and here not in others:
            names[there] = here
    return names


def _noted(table: Table, count: int, words: str) -> Table:
    return replace(table, notes=(*table.notes, f"{count:,} {words}")) if count else table


# --- audio --------------------------------------------------------------------------------------


def _with_audio(table: Table, audio: Sequence[Path], texts: "_Beside", root: Path) -> Table:
    """A table and the audio that it does not name, with the texts that lie beside it."""
    names = _other_names(table.columns, ("audio", "text"))
    rows = []
    for path in audio:
        name = path.relative_to(root).as_posix()
        row = {"id": name, "audio": str(path), **texts.of(path)}
        rows.append({names.get(column, column): value for column, value in row.items()})
    columns = tuple(dict.fromkeys(chain(table.columns, ("id",), *rows)))
    found = Table(columns, [*table.rows, *rows], table.notes)
    return _noted(found, len(rows) if table.rows else 0, "audio files that no list names")


def _with_texts(table: Table, texts: "_Beside") -> Table:
    """A list with the texts that lie beside its files, where it has none itself."""
    columns = dict.fromkeys(table.columns)
    for row in table.rows:
        if all(row.get(name) is None for name in TEXT):
            known = texts.of(Path(_file(row)))
            row.update({name: value for name, value in known.items() if row.get(name) is None})
            columns.update(dict.fromkeys(known))
    return replace(table, columns=tuple(columns))


class _Beside:
    """Texts of clips in files beside them: a file for each clip, or LibriSpeech's for a chapter."""

    def __init__(self, files: Sequence[Path]):
        self.files = set(map(os.path.abspath, files))
        self.read: set[str] = set()
        self.chapters: dict[str, str] = {}
        for path in files:
            if path.name.endswith(".trans.txt"):
                self.read.add(os.path.abspath(path))
                for line in _text(path).splitlines():
                    name, _, text = line.strip().partition(" ")
                    self.chapters[os.path.abspath(path.parent / name)] = text.strip()

    def of(self, audio: Path) -> Row:
        """What is known of a clip: columns of a row."""
        stem = os.path.abspath(audio.with_suffix("")) if audio.name else ""
        if stem in self.chapters:
            whose = LIBRISPEECH_NAME.fullmatch(audio.stem)
            known = {"speaker": whose["speaker"], "recording": whose["chapter"]} if whose else {}
            return {"text": self.chapters[stem], **known}
        for ending in BESIDE:
            if stem + ending in self.files:
                self.read.add(stem + ending)
                return {"text": _text(Path(stem + ending)).strip()}
        if stem + ".json" in self.files:
            (row, *_) = (*read_list(Path(stem + ".json"), DataConfig("")).rows, {})
            usual = (*TEXT, *SPEAKER, *LANGUAGE, *RECORDING, "duration")
            return {name: value for name, value in row.items() if name in usual}
        return {}


def _text(path: Path) -> str:
    with open_text(path) as file:
        text = file.read()
    if SURROGATE.search(text):
        raise InputError(f"{path} is no UTF-8 text: save it as UTF-8")
    return text


def _walk(folder: Path) -> Iterator[str]:
    """All files below a folder, through links too; not those that systems hide there."""
    entered = {os.path.realpath(folder)}

    def failed(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None

    for path, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and (real := os.path.realpath(os.path.join(path, name))) not in entered
            and not entered.add(real)
        ]
        yield from (os.path.join(path, name) for name in files if not name.startswith("._"))


def _audio_types(path: Path, config: DataConfig) -> list[pa.DataType]:
    """Of the columns of a Parquet file that hold or name audio."""
    _, schema = parquet_footer(path)
    return [schema.field(name).type for name in audio_names(config) if name in schema.names]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can only name audio."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
