"""A folder of files as one table: Parquet, lists of audio files, and audio with texts beside it.

Audio that no list names is kept, without text. Splits are never mixed: names of Parquet files, of
lists and of folders tell them, as in `datasets`; names of audio files do not.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from flax_distil.config import DataConfig
from flax_distil.data.lists import (
    SURROGATE,
    audio_base,
    audio_names,
    is_audio,
    list_kind,
    names_audio,
    read_list,
    read_text,
)
from flax_distil.data.parquet import ParquetRows, parquet_footer
from flax_distil.data.table import USUAL, Row, Table, cell_path, cell_seconds
from flax_distil.errors import InputError

SHARD_NAME = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\.parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
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
    parquet = [path for path in files if path.suffix == ".parquet"]
    parquet = [path for path in parquet if path.name != "metadata.parquet"] or parquet
    if audio:  # beside it, Parquet may be of something else
        parquet = [path for path in parquet if _audio_types(path, config)]
    if not parquet or (audio and all(map(_is_text, _audio_types(parquet[0], config)))):
        lists = [path for path in files if list_kind(path) and path.is_file()]
        lists = parquet + [path for path in lists if names_audio(path, config)]
        return _read_lists(lists, audio, files, root, config)
    splits = {path: _split(path, root, config) for path in parquet}
    wanted = _wanted(splits.values(), config)
    rows = ParquetRows([path for path in parquet if wanted(splits[path])])
    first = next(iter(rows), {})
    embedded = not any(cell_path(first.get(name)) for name in audio_names(config))
    notes = _notes({"audio files beside the Parquet files not read": len(audio) * embedded})
    return Table(rows.columns, rows, notes)


def _read_lists(
    lists: Sequence[Path],
    audio: Sequence[Path],
    files: Sequence[Path],
    root: Path,
    config: DataConfig,
) -> Table:
    """The clips of lists, the audio that they do not name, and the texts beside both."""
    column, text = config.audio_column or "audio", config.text_column or "text"
    splits = {path: _split(path, root, config) for path in (*lists, *audio)}
    wanted = _wanted(splits.values(), config)
    tables, of_list = [], False
    for path in lists:
        split = splits[path]
        if split is None or wanted(split):
            of_list |= split is not None and split.of_list
            table = list_table(path, config, root)
            if split is None and config.split:  # its files are of several splits
                in_split = lambda row: wanted(
                    _split(Path(cell_path(row.get(column))), root, config)
                )
                table = replace(table, rows=list(filter(in_split, table.rows)))
            tables.append(table)
    rows, duplicates = _merged(tables, column)
    listed = {os.path.abspath(cell_path(row.get(column))) for row in rows}
    unlisted = [path for path in audio if wanted(splits[path])]
    unlisted = [path for path in unlisted if os.path.abspath(path) not in listed]
    counts = {"clips listed twice": duplicates}
    if of_list:
        counts["audio files that the list of this split does not name"] = len(unlisted)
    else:
        counts["audio files that no list names"] = len(unlisted) * bool(rows)
        for path in unlisted:
            rows.append({"id": path.relative_to(root).as_posix(), column: str(path)})
    if not rows:
        raise InputError(
            f"{config.source} has no Parquet file, no list of audio files (.csv, .tsv, .jsonl, "
            ".json) and no audio: nothing to read"
        )
    read = {*map(os.path.abspath, lists), *_add_texts(rows, files, column, text)}
    if any(row.get(text) is None for row in rows):
        others = [path for path in files if path.suffix in TEXT_SUFFIXES and path.is_file()]
        others = [path for path in others if os.path.abspath(path) not in read]
        others = [path for path in others if path.stem.lower() not in ("readme", "license")]
        if others:
            counts[f"text files not read, such as {others[0].relative_to(root)}"] = len(others)
    notes = tuple(note for table in tables for note in table.notes)
    return _table(rows, notes + _notes(counts))


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


def _audio_types(path: Path, config: DataConfig) -> list[pa.DataType]:
    """The types of a Parquet file's columns that hold or name audio."""
    _, schema = parquet_footer(path)
    return [schema.field(name).type for name in audio_names(config) if name in schema.names]


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can only name audio."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _table(rows: list[Row], notes: tuple[str, ...]) -> Table:
    return Table(tuple(dict.fromkeys(("id", *(name for row in rows for name in row)))), rows, notes)


def _notes(counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{count:,} {what}" for what, count in counts.items() if count)


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
        rows, notes = list(ParquetRows([path])), ()
    else:
        rows, notes = read_list(path, config)
    if not rows and root is None:
        raise InputError(f"{path} has no rows")
    column = config.audio_column or "audio"
    rows = _clips_of_spans([_usual_names(row, config) for row in rows], column)
    is_relative = lambda name: name and "://" not in name and not os.path.isabs(name)
    names = [cell_path(row.get(column)) for row in rows]
    base, suffix = audio_base(path.parent, list(filter(is_relative, names)))
    prefix = "" if root in (None, path.parent) else f"{path.parent.relative_to(root).as_posix()}/"
    for row, name in zip(rows, names, strict=True):
        if name and row.get("id") is None:
            id = prefix + name if is_relative(name) else name
            row["id"] = id if row.get("offset") is None else f"{id}@{row['offset']}"
        if is_relative(name):
            absolute, cell = os.path.join(base, name + suffix), row[column]
            row[column] = {**cell, "path": absolute} if isinstance(cell, dict) else absolute
    return _table(rows, notes)


def _usual_names(row: Row, config: DataConfig) -> Row:
    """A row under the usual names of columns, where `config` names no other; of several columns the
    first with a value."""
    renamed = dict(row)
    for kind in ("audio", "text", "speaker", "language", "recording"):
        if getattr(config, f"{kind}_column") is None:
            known = (name for name in USUAL[kind] if name != config.transcript_column)
            name = next((name for name in known if row.get(name) is not None), kind)
            if name != kind:
                renamed[kind] = renamed.pop(name)
    return renamed


def _clips_of_spans(rows: list[Row], column: str) -> list[Row]:
    """Rows that name one file several times with start and end become clips of it."""
    if any("offset" in row for row in rows):
        return rows
    for start, end in SPANS:
        files = [cell_path(row.get(column)) for row in rows if start in row and end in row]
        if len(set(files)) == len(files):
            continue
        for row in rows:
            first, last = cell_seconds(row.get(start)), cell_seconds(row.get(end))
            if first is not None and last is not None and first < last:
                row |= {"offset": first, "duration": last - first}
        break
    return rows


def _merged(tables: Sequence[Table], column: str) -> tuple[list[Row], int]:
    """The rows of lists, one for each clip, and the number of clips that several lists name."""
    rows: dict[Any, Row] = {}
    duplicates = 0
    for number, table in enumerate(tables):
        before = set(rows)
        for place, row in enumerate(table.rows):
            clip = (os.path.abspath(cell_path(row.get(column))), row.get("offset"))
            if clip in before:
                duplicates += 1
                rows[clip] |= {k: v for k, v in row.items() if rows[clip].get(k) is None}
            else:
                rows[clip if clip not in rows else (clip, number, place)] = row
    return list(rows.values()), duplicates


# --- texts beside audio -------------------------------------------------------------------------


def _add_texts(rows: list[Row], files: Sequence[Path], column: str, text: str) -> set[str]:
    """Add to rows without text what files beside the audio tell; returns the files that were read.

    One file for each clip, or LibriSpeech's for a chapter.
    """
    beside, chapters, read = set(map(os.path.abspath, files)), {}, set()
    for path in files:
        if path.name.endswith(".trans.txt"):
            read.add(os.path.abspath(path))
            for line in _text(path).splitlines():
                name, _, words = line.strip().partition(" ")
                chapters[os.path.abspath(path.parent / name)] = words.strip()

    def known(audio: Path) -> Row:
        stem = os.path.abspath(audio.with_suffix(""))
        if stem in chapters:
            match = LIBRISPEECH_NAME.fullmatch(audio.stem)
            names = {"speaker": match["speaker"], "recording": match["chapter"]} if match else {}
            return {text: chapters[stem], **names}
        for suffix in TEXT_BESIDE:
            if stem + suffix in beside:
                read.add(stem + suffix)
                return {text: _text(Path(stem + suffix)).strip()}
        if stem + ".json" in beside:
            row = next(iter(read_list(Path(stem + ".json"), DataConfig(""))[0]), {})
            row = _usual_names(row, DataConfig(""))
            names = ("text", "speaker", "language", "recording", "duration")
            named = {"text": text}
            return {named.get(name, name): row[name] for name in names if name in row}
        return {}

    for row in rows:
        if row.get(text) is None and (path := cell_path(row.get(column))):
            row |= {k: v for k, v in known(Path(path)).items() if row.get(k) is None}
    return read


def _text(path: Path) -> str:
    text = read_text(path)
    if SURROGATE.search(text):
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8")
    return text
