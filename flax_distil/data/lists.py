"""Lists of clips in text files: JSONL, JSON, CSV and TSV, compressed or not, in any UTF; wav.scp.

The CSV reader of `datasets` is not used because it loses rows of common files: with a comma in an
unquoted text it takes the file name for an index, and an unclosed quote swallows the rows after it.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile, zip_longest
from typing import Any, NamedTuple

from flax_distil.config import DataConfig
from flax_distil.data.paths import is_file, join, read_file
from flax_distil.data.table import AUDIO_SUFFIXES, USUAL, PlacedRow, Row
from flax_distil.data.toolkits import WAV_SCP, is_lhotse, kaldi_rows, lhotse_rows
from flax_distil.errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz")
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
# Where files are, relative to their list; Kaldi's recipes run two folders above it.
SUBFOLDERS = ("", "clips", "wavs", "audio", "wav", "..", "../..")
USUAL_SUFFIXES = ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")  # that names may omit
PROBED = 20  # names of a list that are tried
SURROGATE = re.compile("[\ud800-\udfff]")
BESIDE = ("txt", "normalized.txt", "lab", "json")  # suffixes of files that tell of one clip


def list_kind(path: str) -> str | None:
    """The suffix of a list without that of its compression, or wav.scp; None for other files."""
    if os.path.basename(path) == WAV_SCP:
        return WAV_SCP
    stem, suffix = os.path.splitext(path.lower())
    suffix = os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix
    return suffix if suffix in (*JSON_SUFFIXES, *DELIMITERS) else None


def read_list(path: str, config: DataConfig) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of a list as they are written, and notes of what was guessed in reading them.

    Raises:
        InputError: it cannot be read; the message names the line, the reason and the remedy.
    """
    guesses: dict[str, list[int]] = {}
    text = read_text(path)
    if list_kind(path) == WAV_SCP:
        placed = kaldi_rows(path)
    elif list_kind(path) in DELIMITERS:
        placed = _delimited_rows(path, text, config, guesses)
    else:
        placed = _json_rows(path, text)
    rows, not_utf8 = [], SURROGATE.search(text) is not None
    for place, row in placed:
        for name, value in row.items() if not_utf8 else ():
            # File names may be any bytes.
            if isinstance(value, str) and name not in (*USUAL["audio"], *USUAL["id"]):
                check_utf8(value, f"{path} is not UTF-8 text ({place}, column {name})")
        rows.append(row)
    notes = [
        f"{what}: {len(lines):,} (line {', '.join(map(str, lines[:3]))}{', …' * (len(lines) > 3)})"
        for what, lines in guesses.items()
    ]
    return rows, tuple(notes)


def names_audio(path: str, config: DataConfig) -> bool:
    """Whether a file is a list of audio files, judged by its first row."""
    if list_kind(path) == WAV_SCP:
        return True
    try:
        text = read_text(path)
        if list_kind(path) in DELIMITERS:
            names = _header(path, text.partition("\n")[0], config).columns
        else:
            _, names = next(_json_rows(path, text), ("", ()))
    except InputError:
        return False
    return any(name in names for name in audio_names(config))


def read_text(path: str) -> str:
    """The text of a file, decompressed and decoded; bytes that are not UTF-8 become surrogates.

    Raises:
        InputError: compression or encoding is damaged.
    """
    try:
        return decode_text(read_file(path))
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        raise InputError(f"{path} is damaged ({error}): write it again") from None


def decode_text(data: bytes) -> str:
    """Text in UTF-8, -16 or -32, with or without a byte order mark."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 0 in data[:2]:  # UTF-16 without a mark
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    return data.decode(encoding, "surrogateescape")


def check_utf8(text: str, problem: str) -> str:
    """The text. Raises InputError where bytes of it were not UTF-8."""
    if SURROGATE.search(text):
        raise InputError(f"{problem}: save it as UTF-8")
    return text


def cells_beside(suffix: str, text: str, path: str) -> Row:
    """What a file beside audio tells of it by its suffix: the text, or the cells of a JSON object
    under usual names."""
    check_utf8(text, f"{path} is not UTF-8 text")
    if suffix != "json":
        return {"text": text.strip()}
    _, row = next(_json_rows(path, text), ("", {}))
    return {k: v for k, v in usual_names(row, DataConfig("")).items() if k not in ("id", "audio")}


def usual_names(row: Row, config: DataConfig) -> Row:
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


def audio_base(folder: str, names: Sequence[str]) -> tuple[str, str]:
    """The folder that the relative names of a list start at, and the suffix that they omit.

    The first name that is found decides, in the working directory last. If none is found, names
    start at the list's folder.
    """
    for name in names[:PROBED]:
        for base in (*(join(folder, sub) if sub else folder for sub in SUBFOLDERS), ""):
            for suffix in USUAL_SUFFIXES:
                if is_file(join(base, name + suffix)):
                    return base, suffix
    return folder, ""


def is_relative(name: str) -> bool:
    """Whether a name of a file starts at the folder of its list."""
    return bool(name) and "://" not in name and not os.path.isabs(name)


def is_audio(name: str) -> bool:
    """Whether a name has the suffix of an audio file."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def audio_names(config: DataConfig) -> tuple[str, ...]:
    """The columns that can hold audio: the one that the user named, or the usual ones."""
    return USUAL["audio"] if config.audio_column is None else (config.audio_column,)


# --- JSON ---------------------------------------------------------------------------------------


def _json_rows(path: str, text: str) -> Iterator[PlacedRow]:
    """The objects of JSON lines, of an array, or of an array in an object (`{"data": [...]}`), with
    Lhotse's cuts as clips."""
    placed, is_array = _json_lines(path, text), text.lstrip().startswith("[")
    if is_array or list_kind(path) == ".json":
        try:
            rows = _objects(json.loads(text))
            placed = ((f"row {number}", row) for number, row in enumerate(rows, 1))
        except (ValueError, RecursionError) as error:
            if is_array:
                raise InputError(f"{path} is not JSON: {error}") from None
    for place, row in placed:
        if not isinstance(row, dict):
            raise InputError(f"{path} {place} must be an object such as {{...}}")
        if is_lhotse(row) and not set(USUAL["audio"]).intersection(row):
            yield from ((place, clip) for clip in lhotse_rows(row, f"{path} {place}"))
        else:
            yield place, row


def _json_lines(path: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(io.StringIO(text, newline=""), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path} line {number} is not JSON: {error}") from None


def _objects(whole: Any) -> list[Any]:
    """The rows of a document: its array, its only array of objects, its columns, or itself."""
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else [whole]
    values = list(whole.values())
    lists = [value for value in values if isinstance(value, list) and value]
    objects = [value for value in lists if all(isinstance(one, dict) for one in value)]
    if len(objects) == 1 and not set(USUAL["audio"]) & set(whole):
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
    written: bool = True
    """Whether the file begins with the names of its columns."""
    file: int | None = None
    """Position of the column with the names of audio files."""


def _header(path: str, line: str, config: DataConfig) -> Header:
    """The header in the first line; a line that begins with a file is a row, without a header."""
    line = line.rstrip("\r\n")
    named = {value for name, value in vars(config).items() if name.endswith("_column")}
    usual = {"duration", "offset"}.union(*USUAL.values())
    delimiters = (DELIMITERS[str(list_kind(path))], *OTHER_DELIMITERS)
    first = Header((), delimiters[0])
    for delimiter in delimiters:
        names = [name.strip(' "') for name in line.split(delimiter)]
        columns = tuple(
            name.lower() if name.lower() in usual and name not in named else name for name in names
        )
        file = next((columns.index(one) for one in audio_names(config) if one in columns), None)
        header = Header(columns, delimiter, file=file)
        if file is not None:
            return header
        first = first if first.columns else header
    for delimiter in delimiters:
        name, *others = line.split(delimiter)
        if others and (is_audio(name) or audio_base(os.path.dirname(path), [name])[1]):
            if len(others) >= len(WITHOUT_HEADER):
                raise InputError(
                    f"{path} has {len(others) + 1} columns without names: add a first line such as "
                    "file_name,text"
                )
            return Header(WITHOUT_HEADER[: len(others) + 1], delimiter, written=False, file=0)
    return first


def _delimited_rows(
    path: str, text: str, config: DataConfig, guesses: dict[str, list[int]]
) -> Iterator[PlacedRow]:
    """The rows of a CSV or TSV file. guesses: receives what was guessed, and in which lines."""
    lines = list(io.StringIO(text, newline=""))
    at = next((number for number, line in enumerate(lines) if line.strip()), len(lines))
    if at == len(lines):
        return
    header = _header(path, lines[at], config)
    at += header.written
    while at < len(lines):
        number, (fields, used, unpaired) = at + 1, _record(lines, at, header)
        at += used
        if not any(fields):
            continue
        if unpaired:
            guesses.setdefault("unpaired quotes read as text", []).append(number)
        if len(fields) > len(header.columns):
            fields = _rejoined(path, number, fields, header, config)
            guesses.setdefault("delimiters outside quotes read as text", []).append(number)
        pairs = zip_longest(header.columns, fields, fillvalue="")
        yield f"line {number}", {name: value or None for name, value in pairs}


def _record(lines: Sequence[str], at: int, header: Header) -> tuple[list[str], int, bool]:
    """The fields of the record that begins at a line, its lines, and whether a quote is unpaired.

    A field in quotes may contain line breaks. A quote that is not closed before the next line that
    is a row by itself is text, as in `a.flac,"Well said the guide`.
    """
    delimiter = header.delimiter
    fields = lines[at].rstrip("\r\n").split(delimiter)
    if '"' not in lines[at] or (delimiter == "|" and not header.written):
        return fields, 1, False

    def is_row(line: str) -> bool:
        others = line.rstrip("\r\n").split(delimiter)
        if header.file is None or header.file >= min(len(others), len(fields)):
            return False
        if is_audio(fields[header.file]):
            return is_audio(others[header.file].strip('"'))
        return '"' not in line and len(others) == len(header.columns)

    later = (lines[number] for number in range(at + 1, min(at + LONGEST_FIELD, len(lines))))
    rest = takewhile(lambda line: not is_row(line), later)
    reader = csv.reader(chain([lines[at]], rest), delimiter=delimiter, strict=True)
    try:
        quoted = next(reader)
    except csv.Error:  # a quote is not closed, or text follows the closing one
        return fields, 1, True
    if reader.line_num > 1 and len(quoted) != len(header.columns):
        return fields, 1, True
    return quoted, reader.line_num, False


def _rejoined(
    path: str, number: int, fields: list[str], header: Header, config: DataConfig
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

    names = USUAL["text"] if config.text_column is None else (config.text_column,)
    texts = [place for place, name in enumerate(header.columns) if name in names]
    ways = [joined(texts[0])] if len(texts) == 1 else []
    file = header.file
    if file is not None and not is_audio(fields[file]) and is_audio(joined(file)[file]):
        ways = [way for way in ways if is_audio(way[file])] or [joined(file)]
    if ways:
        return ways[0]
    raise InputError(
        f"{path} line {number} has {len(fields)} fields for {size} columns "
        f"({', '.join(header.columns)}): put quotes around the one that holds {header.delimiter!r}"
    )
