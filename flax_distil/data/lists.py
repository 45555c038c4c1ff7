"""Lists of clips in text files: JSONL, JSON, CSV and TSV, compressed or not, in any UTF.

The CSV reader of `datasets` is not used because it loses rows of common files: with a comma in an
unquoted text it takes the file name for an index, and an unclosed quote swallows the rows after it.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from flax_distil.config import DataConfig
from flax_distil.data.table import (
    AUDIO,
    AUDIO_SUFFIXES,
    ID,
    LANGUAGE,
    RECORDING,
    SPEAKER,
    TEXT,
    Row,
)
from flax_distil.errors import InputError

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = ("|", "\t", ";", ",")
# Byte order marks, the longer ones first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LONGEST_FIELD = 100  # lines of a quoted field: a quote that stays open for longer is text
WITHOUT_HEADER = ("file_name", "text", "normalized_text")  # the columns of LJSpeech
SUBFOLDERS = ("", "clips", "wavs", "audio", "wav", "..")  # where files are, relative to their list
USUAL_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")  # that names may omit
PROBED = 20  # names of a list that are tried
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class ListRows:
    """The rows of a list as they are written, and what was guessed in reading them."""

    rows: list[Row]
    guesses: dict[str, list[int]] = field(default_factory=dict)
    """What was guessed, and in which lines."""

    def guess(self, what: str, line: int) -> None:
        """Note a guess."""
        self.guesses.setdefault(what, []).append(line)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind of guess."""
        return tuple(
            f"{what}: {len(lines):,} (line {', '.join(map(str, lines[:3]))}"
            f"{', …' if len(lines) > 3 else ''})"
            for what, lines in self.guesses.items()
        )


def list_kind(path: Path) -> str | None:
    """The suffix of a list without that of its compression; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*JSON_SUFFIXES, *DELIMITERS) else None


def read_list(path: Path, config: DataConfig) -> ListRows:
    """The rows of a list as they are written.

    Raises:
        InputError: it cannot be read; the message names the line, the reason and the remedy.
    """
    delimiter = DELIMITERS.get(list_kind(path) or "")
    with open_text(path) as file:
        if delimiter:
            return _delimited(path, list(file), delimiter, config)
        return ListRows(list(_json_rows(path, file)))


def names_audio(path: Path, config: DataConfig) -> bool:
    """Whether a file is a list of audio files, judged by its first row."""
    delimiter = DELIMITERS.get(list_kind(path) or "")
    try:
        with open_text(path) as file:
            if delimiter:
                columns = _header(path, file.readline(), delimiter, config).columns
            else:
                columns = tuple(next(_json_rows(path, file), {}))
    except InputError:
        return False
    return any(name in columns for name in audio_names(config))


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A text file, decompressed and decoded; bytes that are not UTF-8 become surrogates.

    Raises:
        InputError: compression or encoding is damaged.
    """
    opener: Any = COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            head = file.peek(4)[:4]
            encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
            if encoding is None and 0 in head[:2]:  # UTF-16 without a mark
                encoding = "utf-16-be" if head[0] == 0 else "utf-16-le"
            yield io.TextIOWrapper(file, encoding or "utf-8", errors="surrogateescape", newline="")
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        raise InputError(f"{path} is damaged ({error}): write it again") from None


def audio_base(folder: Path, names: Sequence[str]) -> tuple[Path, str]:
    """The folder that the relative names of a list start at, and the suffix that they omit.

    The first name that is found decides, in the working directory last. If none is found, names
    start at the list's folder.
    """
    for name in names[:PROBED]:
        for base in (*(folder / sub for sub in SUBFOLDERS), Path()):
            for suffix in USUAL_SUFFIXES:
                if os.path.isfile(base / (name + suffix)):
                    return base, suffix
    return folder, ""


def is_audio(name: str | Path) -> bool:
    """Whether a name has the suffix of an audio file."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def audio_names(config: DataConfig) -> tuple[str, ...]:
    """The columns that can hold audio: the one that the user named, or the usual ones."""
    return AUDIO if config.audio_column is None else (config.audio_column,)


def _checked(path: Path, line: int, row: Row) -> Row:
    """A row whose texts are checked to be UTF-8. File names may be any bytes."""
    for name, value in row.items():
        if name not in (*AUDIO, *ID) and isinstance(value, str) and SURROGATE.search(value):
            raise InputError(
                f"{path} is not UTF-8 text (line {line}, column {name}): save it as UTF-8"
            )
    return row


# --- JSON ---------------------------------------------------------------------------------------


def _json_rows(path: Path, file: io.TextIOWrapper) -> Iterator[Row]:
    """The objects of JSON lines, of an array, or of an array in an object (`{"data": [...]}`)."""
    start = 1
    while (head := file.read(1)).isspace():
        start += head == "\n"
    lines: Any = chain([head + file.readline()], file)
    if head == "[" or list_kind(path) == ".json":
        text = "".join(lines)
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if head == "[":
                raise InputError(f"{path} is not JSON: {error}") from None
            lines = io.StringIO(text)
        else:
            bad = SURROGATE.search(text)
            for number, row in enumerate(_objects(whole), 1):
                if not isinstance(row, dict):
                    raise InputError(f"{path} row {number} must be an object such as {{...}}")
                yield _checked(path, number, row) if bad else row
            return
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} must be an object such as {{...}}")
        yield _checked(path, number, row) if SURROGATE.search(line) else row


def _objects(whole: Any) -> list[Any]:
    """The rows of a document: its array, its only array of objects, its columns, or itself."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    values = list(whole.values())
    lists = [value for value in values if isinstance(value, list) and value]
    objects = [value for value in lists if all(isinstance(one, dict) for one in value)]
    if len(objects) == 1 and not set(AUDIO) & set(whole):
        return objects[0]
    if values and all(isinstance(value, dict) and "0" in value for value in values):  # of pandas
        lists = values = [list(value.values()) for value in values]
    if len(values) > 1 and len(lists) == len(values) and len({len(one) for one in lists}) == 1:
        return [dict(zip(whole, row, strict=True)) for row in zip(*lists, strict=True)]
    return [whole]


# --- CSV and TSV --------------------------------------------------------------------------------


class Header(NamedTuple):
    """How the rows of a delimited file are written."""

    columns: tuple[str, ...]
    delimiter: str
    quoted: bool = True
    """Whether quotes can surround a field."""
    written: bool = True
    """Whether the file begins with the names of its columns."""

    def place(self, names: Sequence[str]) -> int | None:
        """The position of the first of these columns."""
        return next((self.columns.index(name) for name in names if name in self.columns), None)


def _header(path: Path, line: str, default: str, config: DataConfig) -> Header:
    """The header in the first line; a line that begins with a file is a row, without a header."""
    line = line.rstrip("\r\n")
    for delimiter in (default, *OTHER_DELIMITERS):
        columns = _names(_fields(line, delimiter).values, config)
        if any(name in columns for name in audio_names(config)):
            return Header(columns, delimiter)
    for delimiter in (default, *OTHER_DELIMITERS):
        first, *others = line.split(delimiter)
        if others and (is_audio(first) or audio_base(path.parent, [first])[1]):
            if len(others) >= len(WITHOUT_HEADER):
                raise InputError(
                    f"{path} has {len(others) + 1} columns without names: add a first line such as "
                    "file_name,text"
                )
            columns = WITHOUT_HEADER[: len(others) + 1]
            return Header(columns, delimiter, quoted=delimiter != "|", written=False)
    return Header(_names(_fields(line, default).values, config), default)


def _names(written: Sequence[str], config: DataConfig) -> tuple[str, ...]:
    """Names of columns; those that are usual names in other case (`File_Name`) become these."""
    named = {value for name, value in vars(config).items() if name.endswith("_column")}
    usual = {*AUDIO, *TEXT, *ID, *SPEAKER, *LANGUAGE, *RECORDING, "duration", "offset"}
    names = (name.strip() for name in written)
    return tuple(
        name.lower() if name.lower() in usual and name not in named else name for name in names
    )


def _delimited(path: Path, lines: list[str], default: str, config: DataConfig) -> ListRows:
    at = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    if at == len(lines):
        return ListRows([])
    header = _header(path, lines[at], default, config)
    file = header.place(audio_names(config))
    at += header.written
    found = ListRows([])
    while at < len(lines):
        number, (fields, used, stray) = at + 1, _record(lines, at, header, file)
        at += used
        if not any(fields):
            continue
        if stray:
            found.guess("unpaired quotes read as text", number)
        if len(fields) > len(header.columns):
            fields = _rejoined(path, number, fields, header, config)
            found.guess("delimiters outside quotes read as text", number)
        row = dict.fromkeys(header.columns)
        row.update(zip(header.columns, (value or None for value in fields), strict=False))
        whole = any(SURROGATE.search(line) for line in lines[number - 1 : at])
        found.rows.append(_checked(path, number, row) if whole else row)
    return found


class Fields(NamedTuple):
    """The fields of a record."""

    values: list[str]
    stray: bool = False
    """Whether a field begins with a quote and does not end with one."""
    open: bool = False
    """Whether a field is in quotes to the end, so that it may continue in the next line."""


def _fields(record: str, delimiter: str) -> Fields:
    if '"' not in record:
        return Fields(record.split(delimiter))
    quoted = re.compile(rf'"((?:[^"]|"")*+)(?:"(?={re.escape(delimiter)}|\Z)|(\Z))')
    values, at, stray, open_ = [], 0, False, False
    while True:
        match = quoted.match(record, at)
        if match and match[2] is None:
            values.append(match[1].replace('""', '"'))
            end = match.end()
        else:
            open_ |= match is not None and not stray  # only its end is missing
            stray |= record.startswith('"', at)
            end = record.find(delimiter, at)
            end = len(record) if end < 0 else end
            values.append(record[at:end])
        if end == len(record):
            return Fields(values, stray, open_)
        at = end + 1


def _record(
    lines: Sequence[str], at: int, header: Header, file: int | None
) -> tuple[list[str], int, bool]:
    """The fields of the record that begins at a line, its lines, and whether a quote is unpaired.

    A field in quotes may contain line breaks. A quote that is not closed before the next line that
    is a row by itself is text, as in `a.flac,"Well said the guide`.
    """
    line, delimiter = lines[at].rstrip("\r\n"), header.delimiter
    if not header.quoted:
        return line.split(delimiter), 1, False
    found = alone = _fields(line, delimiter)
    for end in range(at + 1, min(at + LONGEST_FIELD, len(lines))):
        if not found.open or _is_row(lines[end].rstrip("\r\n"), header, alone.values, file):
            break
        if '"' in lines[end]:
            found = _fields("".join(lines[at : end + 1]).rstrip("\r\n"), delimiter)
            if not found.stray and len(found.values) == len(header.columns):
                return found.values, end + 1 - at, False
    return alone.values, 1, alone.stray


def _is_row(line: str, header: Header, before: Sequence[str], file: int | None) -> bool:
    """Whether a line is a row, not the rest of a field of the previous line."""
    fields = line.split(header.delimiter)
    if file is None or file >= min(len(fields), len(before)):
        return False
    if is_audio(before[file]):
        return is_audio(fields[file].strip('"'))
    return '"' not in line and len(fields) == len(header.columns)


def _rejoined(
    path: Path, number: int, fields: list[str], header: Header, config: DataConfig
) -> list[str]:
    """As many fields as columns: surplus delimiters belong to the text, or to the file name.

    Raises:
        InputError: two columns hold text.
    """
    size, surplus = len(header.columns), len(fields) - len(header.columns)
    if not any(fields[size:]):
        return fields[:size]

    def joined(place: int) -> list[str]:
        end = place + surplus + 1
        return [*fields[:place], header.delimiter.join(fields[place:end]), *fields[end:]]

    file = header.place(audio_names(config))
    names = TEXT if config.text_column is None else (config.text_column,)
    texts = [place for place, name in enumerate(header.columns) if name in names]
    ways = [joined(texts[0])] if len(texts) == 1 else []
    if file is not None and not is_audio(fields[file]) and is_audio(joined(file)[file]):
        ways = [way for way in ways if is_audio(way[file])] or [joined(file)]
    if ways:
        return ways[0]
    raise InputError(
        f"{path} line {number} has {len(fields)} fields for {size} columns "
        f"({', '.join(header.columns)}): put quotes around the one that holds {header.delimiter!r}"
    )
