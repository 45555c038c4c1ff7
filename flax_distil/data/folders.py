"""A folder of files as one table: Parquet, tars, lists of audio files, and audio with texts beside.

Audio that no list names is kept, without text. Splits are never mixed: names of Parquet files, of
tars, of lists and of folders tell them, as in `datasets`; names of audio files do not.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from flax_distil.config import DataConfig
from flax_distil.data.lists import (
    BESIDE,
    audio_base,
    audio_names,
    cells_beside,
    check_utf8,
    is_audio,
    is_relative,
    list_kind,
    names_audio,
    read_list,
    read_text,
    usual_names,
)
from flax_distil.data.paths import absolute, is_file, is_folder, join, relative
from flax_distil.data.rows import ParquetRows, parquet_footer, read_tars, stream_tars
from flax_distil.data.table import Row, Table, cell_path, cell_seconds
from flax_distil.errors import InputError

SHARD_NAME = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\.parquet")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
LIBRISPEECH_NAME = re.compile(r"(?P<chapter>(?P<speaker>\d+)-\d+)-\d+")
SPANS = (("start", "end"), ("start_time", "end_time"), ("begin", "end"))  # seconds
NAMES = (pa.string(), pa.large_string())  # types of columns that can only name audio
TEXT_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".lab", ".srt", ".vtt", ".stm", ".gz")


class Split(NamedTuple):
    """The split that a file belongs to."""

    name: str
    kind: str
    """train, validation or test if the name says so, else the name."""
    of_list: bool = False
    """Whether the name is a list's: audio that it does not name is not in the split."""


def read_files(files: Sequence[str], root: str, config: DataConfig) -> Table:
    """Files below `root` as one table, of the split that `config` names.

    Raises:
        InputError: there are several splits and none is named, the split is missing, or no file
            holds a clip.
    """
    audio = [path for path in files if is_audio(path)]
    parquet = [path for path in files if path.endswith(".parquet")]
    parquet = [path for path in parquet if not path.endswith("/metadata.parquet")] or parquet
    if audio:  # beside it, Parquet may be of something else
        parquet = [path for path in parquet if _audio_types(path, config)]
    if audio and all(kind in NAMES for path in parquet[:1] for kind in _audio_types(path, config)):
        lists, shards = parquet, []
    else:
        lists, shards = [], parquet or [path for path in files if path.endswith(".tar")]
    if config.streaming and not (shards and shards[0].endswith(".tar")):
        raise InputError(
            f"{config.source} is a local dataset and streaming is for the hub and for tar files: "
            "leave it out"
        )
    if not shards:
        some = [path for path in files if list_kind(path) and is_file(path)]
        lists += [path for path in some if len(files) == 1 or names_audio(path, config)]
        return _read_lists(lists, audio, files, root, config)
    splits = {path: _split(path, root, config) for path in shards}
    wanted = _wanted(splits.values(), config)
    shards = [path for path in shards if wanted(splits[path])]
    if not parquet:
        return stream_tars(shards) if config.streaming else read_tars(shards)
    rows = ParquetRows(shards)
    first = rows[0] if audio and rows else {}
    embedded = not any(cell_path(first.get(name)) for name in audio_names(config))
    notes = _notes({"audio files beside the Parquet files not read": len(audio) * embedded})
    return Table(rows.columns, rows, notes)


def _read_lists(
    lists: Sequence[str],
    audio: Sequence[str],
    files: Sequence[str],
    root: str,
    config: DataConfig,
) -> Table:
    """The clips of lists, the audio that they do not name, and the texts beside both."""
    column, text = config.audio_column or "audio", config.text_column or "text"
    splits = {path: _split(path, root, config) for path in (*lists, *audio)}
    wanted = _wanted(splits.values(), config)
    rows: dict[Any, Row] = {}  # by clip, which several lists may name
    notes: list[str] = []
    of_list, duplicates = False, 0
    for path in lists:
        split, earlier = splits[path], set(rows)
        if split is not None and not wanted(split):
            continue
        of_list |= split is not None and split.of_list
        listed, guesses = list_rows(path, config, root)
        notes += guesses
        for number, row in enumerate(listed):
            file = cell_path(row.get(column))
            if split is None and config.split and not wanted(_split(file, root, config)):
                continue  # the list's files are of several splits
            clip = (absolute(file), row.get("offset"))
            if clip in earlier:
                duplicates += 1
                rows[clip] |= {k: v for k, v in row.items() if rows[clip].get(k) is None}
            else:
                rows[clip if clip not in rows else (clip, path, number)] = row
    listed = {absolute(cell_path(row.get(column))) for row in rows.values()}
    unlisted = [path for path in audio if wanted(splits[path]) and absolute(path) not in listed]
    counts = {"clips listed twice": duplicates}
    counts["tars beside audio not read"] = sum(path.endswith(".tar") for path in files)
    if of_list:
        counts["audio files that the list of this split does not name"] = len(unlisted)
    else:
        counts["audio files that no list names"] = len(unlisted) * bool(rows)
        rows |= {path: {"id": relative(path, root), column: path} for path in unlisted}
    if not rows:
        raise InputError(
            f"{config.source} has no rows: no Parquet file, tar, list of audio files (.csv, .tsv, "
            ".jsonl, .json, wav.scp) or audio with a clip, so there is nothing to read"
        )
    clips = list(rows.values())
    read = {*map(absolute, lists), *_add_texts(clips, files, column, text)}
    if any(row.get(text) is None for row in clips):
        others = [path for path in files if path.endswith(TEXT_SUFFIXES) and is_file(path)]
        others = [path for path in others if absolute(path) not in read]
        others = [one for one in others if not re.match(r"readme|license", _stem(one).lower())]
        if others:
            counts[f"text files not read, such as {relative(others[0], root)}"] = len(others)
    columns = dict.fromkeys(("id", *(name for row in clips for name in row)))
    return Table(tuple(columns), clips, (*notes, *_notes(counts)))


def _audio_types(path: str, config: DataConfig) -> list[pa.DataType]:
    """The types of a Parquet file's columns that hold or name audio."""
    _, schema = parquet_footer(path)
    return [schema.field(name).type for name in audio_names(config) if name in schema.names]


def _notes(counts: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{count:,} {what}" for what, count in counts.items() if count)


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".")[0]


# --- splits -------------------------------------------------------------------------------------


def _split(path: str, root: str, config: DataConfig) -> Split | None:
    """The split that the names of a file's folders, of a list or of a Parquet file tell."""
    if match := SHARD_NAME.fullmatch(os.path.basename(path)):
        name = match["split"]
        return Split(name, SPLITS.get(name, name))
    stem, below = _stem(path), relative(path, root)
    if path.endswith(".tsv") and is_folder(join(os.path.dirname(path), "clips")):  # Common Voice
        return Split(stem, SPLITS.get(stem, stem), of_list=True)
    if below is None:  # lists may name files elsewhere
        return None
    for name in below.split("/")[:-1]:
        if name in wanted_names(config) or _split_kind(name):
            return Split(name, _split_kind(name) or name)
    if not is_audio(path) and (kind := _split_kind(stem)):
        return Split(stem, kind, of_list=True)
    return None


def _split_kind(name: str) -> str | None:
    """train, validation or test if a word of the name is one of them."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def wanted_names(config: DataConfig) -> list[str]:
    """The names in `config.split`, such as `train+test`."""
    return (config.split or "").split("+")


def check_split(path: str, config: DataConfig) -> None:
    """Raises InputError where neither a file nor its folder has the name of `config.split`."""
    if config.split is not None:
        _wanted([_split(path, os.path.dirname(os.path.dirname(absolute(path))), config)], config)


def _wanted(splits: Iterable[Split | None], config: DataConfig) -> Callable[[Split | None], bool]:
    """Which splits are read. Raises InputError where that is ambiguous, or one is missing."""
    known = {split for split in splits if split}
    names = ", ".join(sorted({split.name for split in known})) or "none"
    if config.split is None:
        if len({split.kind for split in known}) > 1:
            raise InputError(
                f"{config.source} has the splits {names}: name one as split, or several as A+B"
            )
        return lambda _: True
    wanted = set()
    for name in wanted_names(config):
        kind = SPLITS.get(name, name)
        named = {split for split in known if split.name == name}
        named = named or {split for split in known if split.kind == kind}
        if not named:
            raise InputError(f"{config.source} has no split {name}; it has {names}")
        wanted |= named
    return lambda split: split in wanted


# --- lists --------------------------------------------------------------------------------------


def list_rows(path: str, config: DataConfig, root: str) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of a list, under the usual names of columns where `config` names no others, and
    notes.

    Relative file names start at the list's folder, or where the files are found. Ids are the names
    as they are written, below `root` with the list's folder, so that they are the same everywhere.
    """
    if path.endswith(".parquet"):
        rows, notes = list(ParquetRows([path])), ()
    else:
        rows, notes = read_list(path, config)
    column, folder = config.audio_column or "audio", os.path.dirname(path)
    rows = _clips_of_spans([usual_names(row, config) for row in rows], column)
    names = [cell_path(row.get(column)) for row in rows]
    base, suffix = audio_base(folder, list(filter(is_relative, names)))
    prefix = (relative(path, root) or "")[: -len(os.path.basename(path))]
    for row, name in zip(rows, names, strict=True):
        if name and row.get("id") is None:
            id = prefix + name if is_relative(name) else name
            row["id"] = id if row.get("offset") is None else f"{id}@{row['offset']}"
        if is_relative(name):
            found, cell = join(base, name + suffix), row[column]
            row[column] = {**cell, "path": found} if isinstance(cell, dict) else found
    return rows, notes


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


def _add_texts(rows: list[Row], files: Sequence[str], column: str, text: str) -> set[str]:
    """Add to rows without text what files beside the audio tell, one for each clip or LibriSpeech's
    for a chapter. Returns the files that were read."""
    beside, chapters, read = set(map(absolute, files)), {}, set()
    for path in beside:
        if path.endswith(".trans.txt"):
            read.add(path)
            lines = check_utf8(read_text(path), f"{path} is not UTF-8 text").splitlines()
            for name, _, words in (line.strip().partition(" ") for line in lines):
                match = LIBRISPEECH_NAME.fullmatch(name)
                names = (
                    {"speaker": match["speaker"], "recording": match["chapter"]} if match else {}
                )
                chapters[join(os.path.dirname(path), name)] = {"text": words.strip(), **names}
    for row in rows:
        if row.get(text) is not None or not (path := cell_path(row.get(column))):
            continue
        stem = os.path.splitext(absolute(path))[0]
        file = next((one for one in (f"{stem}.{end}" for end in BESIDE) if one in beside), None)
        known = dict(chapters.get(stem, {}))
        if file is not None and not known:
            read.add(file)
            known = cells_beside(file[len(stem) + 1 :], read_text(file), file)
        if "text" in known:
            known[text] = known.pop("text")
        row |= {name: value for name, value in known.items() if row.get(name) is None}
    return read
