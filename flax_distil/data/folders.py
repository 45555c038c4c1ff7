"""A folder of files as one table: Parquet, lists of audio files, and audio with texts beside it.

Audio that no list names is kept, without text. Splits are never mixed: names of Parquet files, of
lists and of folders tell them, as in `datasets`; names of audio files do not.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import pyarrow as pa

from flax_distil.config import DataConfig
from flax_distil.data.cells import cell_seconds
from flax_distil.data.lists import (
    PROBED,
    SURROGATE,
    ListRows,
    audio_base,
    audio_names,
    is_audio,
    list_kind,
    names_audio,
    open_text,
    read_list,
)
from flax_distil.data.parquet import ParquetRows, parquet_footer, read_parquet
from flax_distil.data.table import LANGUAGE, RECORDING, SPEAKER, TEXT, Row, Table, usual_columns
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
TEXT_BESIDE = (".txt", ".normalized.txt", ".lab")  # suffixes of a file with the text of one clip


class Split(NamedTuple):
    """The split that a file belongs to."""

    name: str
    kind: str
    """train, validation or test if the name says so, else the name."""
    of_list: bool = False
    """Whether the name is a list's: audio that it does not name is not in the split."""


def read_folder(folder: Path, config: DataConfig) -> Table:
    """The files in a folder and below it. Raises InputError like `read_files`."""
    return read_files(sorted(map(Path, _walk(folder))), folder, config)


def read_files(files: Sequence[Path], root: Path, config: DataConfig) -> Table:
    """Files below `root` as one table, of the split that `config` names.

    Raises:
        InputError: there are several splits and none is named, the split is missing, or no file
            holds a clip.
    """
    audio = [path for path in files if is_audio(path)]
    parquet = _parquet_files(files, bool(audio), config)
    if parquet and not (audio and all(map(is_text, _audio_types(parquet[0], config)))):
        splits = {path: _split(path, root, config) for path in parquet}
        wanted = _wanted(splits.values(), config)
        table = read_parquet([path for path in parquet if wanted(splits[path])], config.source)
        embedded = not any(map(_path, _audio_cells(next(iter(table.rows), {}), config)))
        return _noted(table, len(audio) * embedded, "audio files beside the Parquet files not read")

    texts = [path for path in files if list_kind(path) and path.is_file()]
    lists = parquet + [path for path in texts if names_audio(path, config)]
    splits = {path: _split(path, root, config) for path in (*lists, *audio)}
    wanted = _wanted(splits.values(), config)
    tables, of_list = [], False
    column = config.audio_column or "audio"
    for path in lists:
        split = splits[path]
        if split is not None and not wanted(split):
            continue
        table = list_table(path, config, root)
        if split is not None:
            of_list |= split.of_list
        elif config.split:
            in_split = lambda row: wanted(_split(Path(_path(row.get(column))), root, config))
            table = replace(table, rows=list(filter(in_split, table.rows)))
        tables.append(table)
    table, beside = _merged(tables, column), _TextsBeside(files)
    if config.text_column is None:
        table = _table([beside.added(row, column) for row in table.rows], table.notes)
    listed = {os.path.abspath(_path(row.get(column))) for row in table.rows}
    unlisted = [path for path in audio if wanted(splits[path])]
    unlisted = [path for path in unlisted if os.path.abspath(path) not in listed]
    if of_list:
        return _noted(table, len(unlisted), "audio files that the list of this split does not name")
    if unlisted:
        table = _with_audio(table, unlisted, beside, root, config)
    if not table.rows:
        raise InputError(
            f"{config.source} has no Parquet file, no list of audio files (.csv, .tsv, .jsonl, "
            ".json) and no audio: nothing to read"
        )
    if any(row.get(config.text_column or "text") is None for row in table.rows):
        return _with_unread(table, files, {*map(os.path.abspath, lists), *beside.read}, root)
    return table


def _parquet_files(files: Sequence[Path], audio: bool, config: DataConfig) -> list[Path]:
    """The Parquet files that hold clips or, beside audio files, name them."""
    parquet = [path for path in files if path.suffix == ".parquet"]
    parquet = [path for path in parquet if path.name != "metadata.parquet"] or parquet
    return [path for path in parquet if not audio or _audio_types(path, config)]


def _with_unread(table: Table, files: Sequence[Path], read: set[str], root: Path) -> Table:
    """A table that lacks texts, with a note of the text files that were not read."""
    others = [path for path in files if path.suffix in TEXT_SUFFIXES and path.is_file()]
    others = [path for path in others if os.path.abspath(path) not in read]
    others = [path for path in others if path.stem.lower() not in ("readme", "license")]
    if not others:
        return table
    return _noted(table, len(others), f"text files not read, such as {others[0].relative_to(root)}")


# --- splits -------------------------------------------------------------------------------------


def _split(path: Path, root: Path, config: DataConfig) -> Split | None:
    """The split that the names of a file's folders, of a list or of a Parquet file tell."""
    if match := SHARD_NAME.fullmatch(path.name):
        name = match["split"]
        return Split(name, SPLITS.get(name, name))
    stem = path.name.partition(".")[0]
    if path.suffix == ".tsv" and (path.parent / "clips").is_dir():  # Common Voice
        return Split(stem, SPLITS.get(stem, stem), of_list=True)
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    if not path.is_relative_to(root):  # lists may name files elsewhere
        return None
    for name in path.relative_to(root).parts[:-1]:
        if name == config.split or _split_kind(name):
            return Split(name, _split_kind(name) or name)
    if not is_audio(path) and (kind := _split_kind(stem)):
        return Split(stem, kind, of_list=True)
    return None


def _split_kind(name: str) -> str | None:
    """train, validation or test if a word of the name is one of them."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def check_split(path: Path, config: DataConfig) -> None:
    """Raises InputError where neither a file nor its folder has the name of `config.split`."""
    if config.split is not None:
        _wanted([_split(path, path.parent.parent, config)], config)


def _wanted(splits: Iterable[Split | None], config: DataConfig) -> Callable[[Split | None], bool]:
    """Which splits are read. Raises InputError where that is ambiguous, or none."""
    known = {split for split in splits if split}
    names = ", ".join(sorted({split.name for split in known})) or "none"
    if config.split is None:
        if len({split.kind for split in known}) > 1:
            raise InputError(f"{config.source} has the splits {names}: name one as split")
        return lambda _: True
    kind = SPLITS.get(config.split, config.split)
    wanted = {split for split in known if split.name == config.split}
    wanted = wanted or {split for split in known if split.kind == kind}
    if not wanted:
        raise InputError(f"{config.source} has no split {config.split}; it has {names}")
    return lambda split: split in wanted


# --- lists --------------------------------------------------------------------------------------


def list_table(path: Path, config: DataConfig, root: Path | None = None) -> Table:
    """The rows of a list, under the usual names of columns where `config` names no others.

    Relative file names start at the list's folder, or where the files are found. Ids are the names
    as they are written, below `root` with the list's folder, so that they are the same everywhere.
    """
    if path.suffix == ".parquet":
        found = ListRows(list(ParquetRows([path])))
    else:
        found = read_list(path, config)
    if not found.rows and root is None:
        raise InputError(f"{path} has no rows")
    column, usual = config.audio_column or "audio", usual_columns(config)
    rows = _clips_of_spans([_usual_names(row, usual) for row in found.rows], column)
    names = [_path(row.get(column)) for row in rows]
    base, suffix = audio_base(path.parent, list(islice(filter(_is_relative, names), PROBED)))
    prefix = path.parent.relative_to(root).as_posix() + "/" if root else "./"
    prefix = "" if prefix == "./" else prefix
    for row, name in zip(rows, names, strict=True):
        if name and row.get("id") is None:
            id = prefix + name if _is_relative(name) else name
            row["id"] = id if row.get("offset") is None else f"{id}@{row['offset']}"
        if _is_relative(name):
            absolute, cell = os.path.join(base, name + suffix), row[column]
            row[column] = {**cell, "path": absolute} if isinstance(cell, dict) else absolute
    return _table(rows, found.notes())


def _usual_names(row: Row, usual: dict[str, tuple[str, ...]]) -> Row:
    """A row whose columns have the usual names, of several columns the first with a value."""
    renamed = dict(row)
    for column, names in usual.items():
        name = next((name for name in names if row.get(name) is not None), column)
        if name != column:
            renamed[column] = renamed.pop(name)
    return renamed


def _clips_of_spans(rows: list[Row], column: str) -> list[Row]:
    """Rows that name one file several times with start and end become clips of it."""
    if any("offset" in row for row in rows):
        return rows
    for start, end in SPANS:
        files = [_path(row.get(column)) for row in rows if start in row and end in row]
        if len(set(files)) < len(files):
            return [_clip_of_span(row, row.get(start), row.get(end)) for row in rows]
    return rows


def _clip_of_span(row: Row, start: Any, end: Any) -> Row:
    first, last = cell_seconds(start), cell_seconds(end)
    if first is None or last is None or first >= last:
        return row
    return {**row, "offset": first, "duration": last - first}


def _path(cell: Any) -> str:
    """The file that an audio cell names and does not contain, or ""."""
    if isinstance(cell, dict):
        cell = None if cell.get("bytes") else cell.get("path")
    return cell if isinstance(cell, str) else ""


def _is_relative(name: str) -> TypeGuard[str]:
    return name != "" and "://" not in name and not os.path.isabs(name)


def _merged(tables: Sequence[Table], column: str) -> Table:
    """Lists one after the other; a clip that several of them name becomes one row."""
    rows: dict[Any, Row] = {}
    duplicates = 0
    for number, table in enumerate(tables):
        before = set(rows)
        for place, row in enumerate(table.rows):
            clip = (os.path.abspath(_path(row.get(column))), row.get("offset"))
            if clip in before:
                duplicates += 1
                rows[clip] |= {k: v for k, v in row.items() if rows[clip].get(k) is None}
            else:
                rows[clip if clip not in rows else (clip, number, place)] = row
    table = _table(list(rows.values()), tuple(note for table in tables for note in table.notes))
    return _noted(table, duplicates, "clips listed twice")


def _table(rows: list[Row], notes: tuple[str, ...]) -> Table:
    return Table(tuple(dict.fromkeys(("id", *(name for row in rows for name in row)))), rows, notes)


def _noted(table: Table, count: int, words: str) -> Table:
    return replace(table, notes=(*table.notes, f"{count:,} {words}")) if count else table


# --- audio --------------------------------------------------------------------------------------


def _with_audio(
    table: Table, audio: Sequence[Path], texts: "_TextsBeside", root: Path, config: DataConfig
) -> Table:
    """A table and audio files that it does not name, with the texts beside them."""
    rows = []
    for path in audio:
        known = texts.of(path)
        if config.text_column is not None and "text" in known:
            known = {config.text_column: known["text"], **known}
        id = path.relative_to(root).as_posix()
        rows.append({"id": id, config.audio_column or "audio": str(path), **known})
    found = _table([*table.rows, *rows], table.notes)
    return _noted(found, len(rows) if table.rows else 0, "audio files that no list names")


class _TextsBeside:
    """Texts in files beside the audio: one for each clip, or LibriSpeech's for a chapter."""

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

    def added(self, row: Row, column: str) -> Row:
        """A row with what is known of its clip, where it has no text itself."""
        if row.get("text") is not None:
            return row
        known = self.of(Path(_path(row.get(column))))
        return row | {name: value for name, value in known.items() if row.get(name) is None}

    def of(self, audio: Path) -> Row:
        """What is known of a clip: columns of a row."""
        stem = os.path.abspath(audio.with_suffix("")) if audio.name else ""
        if stem in self.chapters:
            match = LIBRISPEECH_NAME.fullmatch(audio.stem)
            known = {"speaker": match["speaker"], "recording": match["chapter"]} if match else {}
            return {"text": self.chapters[stem], **known}
        for suffix in TEXT_BESIDE:
            if stem + suffix in self.files:
                self.read.add(stem + suffix)
                return {"text": _text(Path(stem + suffix)).strip()}
        if stem + ".json" in self.files:
            config = DataConfig("")
            row = next(iter(read_list(Path(stem + ".json"), config).rows), {})
            usual = usual_columns(config)
            known = {*TEXT, *SPEAKER, *LANGUAGE, *RECORDING, "duration"}
            return _usual_names({name: row[name] for name in row if name in known}, usual)
        return {}


def _text(path: Path) -> str:
    with open_text(path) as file:
        text = file.read()
    if SURROGATE.search(text):
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8")
    return text


def _walk(folder: Path) -> Iterator[str]:
    """All files below a folder, through links too, without those that systems hide there."""
    entered = {os.path.realpath(folder)}

    def failed(error: OSError) -> None:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None

    for path, folders, files in os.walk(folder, followlinks=True, onerror=failed):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX"))
            and (real := os.path.realpath(os.path.join(path, name))) not in entered
            and not entered.add(real)
        ]
        yield from (os.path.join(path, name) for name in files if not name.startswith("._"))


def _audio_cells(row: Row, config: DataConfig) -> Iterator[Any]:
    return (row.get(name) for name in audio_names(config))


def _audio_types(path: Path, config: DataConfig) -> list[pa.DataType]:
    """The types of a Parquet file's columns that hold or name audio."""
    _, schema = parquet_footer(path)
    return [schema.field(name).type for name in audio_names(config) if name in schema.names]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can only name audio."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
