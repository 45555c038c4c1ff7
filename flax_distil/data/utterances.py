"""Utterances: the clips of any dataset, one at a time."""

import logging
import os
import reprlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32, Int

from flax_distil.audio.load import SAMPLE_RATE, AudioError, load_audio
from flax_distil.config import DataConfig
from flax_distil.data.lists import audio_base, is_relative
from flax_distil.data.paths import is_url, join, read_file
from flax_distil.data.rows import ParquetRows, TarRows
from flax_distil.data.sources import read_table
from flax_distil.data.table import (
    UTTERANCE_NUMBER,
    Columns,
    Row,
    Rows,
    array_to_waveform,
    cell_audio,
    cell_bool,
    cell_language,
    cell_name,
    cell_seconds,
    cell_text,
    cell_tokens,
    escape,
    find_columns,
    is_missing,
)
from flax_distil.errors import InputError
from flax_distil.text.languages import to_language_code

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """One clip and what is known about it; the audio is not decoded."""

    id: str
    audio: str | bytes | np.ndarray = field(repr=False)
    """Path or URL, contents of a file, or samples: [n] or [channels, n] in [-1, 1] or integers, at
    `rate`."""
    text: str | None = None
    """The reference."""
    duration: float | None = None
    """Seconds, if the dataset gives them; with an `offset`, the length of the clip."""
    speaker: str | None = None
    language: str | None = None
    """Whisper's code; a language that Whisper does not have is as the source writes it."""
    offset: float | None = None
    """Start of the clip in a longer recording, in seconds; None for the whole audio."""
    format: str | None = None
    """Container of bytes that have no header, such as g722."""
    rate: float | None = None
    """Sampling rate in Hz where `audio` is samples; None for 16 kHz."""
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    """The pseudo-label of a label store, without prompt and end of text."""
    teacher_states: Float16[np.ndarray, "n D"] | None = field(default=None, repr=False)
    """The teacher's final states at prompt and label, where the label store holds them."""
    transcript: str | None = field(default=None, repr=False)
    """The pseudo-label as text, with timestamps and special tokens written out (`<|0.00|>`)."""
    previous: str | tuple[int, ...] | None = field(default=None, repr=False)
    """The previous text that the label was conditioned on (`condition_on_prev`): text or token ids,
    which begin with `<|startofprev|>` in distil-whisper's label sets."""
    recording: str | None = None
    """The recording, chapter or session that it belongs to; with an `offset`, the file."""
    ended: bool = True
    """Whether the label is complete; False where it was cut at the maximum length."""
    speech: bool = True
    """Whether there is speech; False for silence, noise and music, whose text is empty."""
    parts: tuple["Utterance", ...] = field(default=(), repr=False)
    """The utterances of a packed window, whose audio is theirs, `pause` seconds apart."""
    pause: float = 0.0
    fault: str | None = None
    """The error in its row, which `load_waveform` raises, so that the row is skipped."""


@dataclass(frozen=True)
class Skipped:
    """An utterance that could not be used, and the reason; both can be written to any file."""

    id: str
    reason: str

    def __post_init__(self):
        object.__setattr__(self, "id", escape(self.id))
        object.__setattr__(self, "reason", escape(self.reason))


@dataclass(frozen=True, eq=False)
class Utterances(Sequence):
    """The utterances of a table with a length; a row is read when it is needed."""

    rows: Rows
    columns: Columns
    config: DataConfig
    folder: str | None = None
    """The folder that relative paths in the rows start at."""
    taken: Int[np.ndarray, "n"] = None  # type: ignore[assignment]
    """Numbers of the selected rows; by default those within `config.limit`."""

    def __post_init__(self):
        if self.taken is None:
            object.__setattr__(self, "taken", np.arange(len(self.rows))[: self.config.limit])

    def take(self, numbers: Int[np.ndarray, "m"]) -> "Utterances":
        """The utterances of these numbers, as a dataset."""
        return replace(self, taken=self.taken[numbers])

    def __len__(self) -> int:
        return len(self.taken)

    def __getitem__(self, index) -> Any:
        number = int(self.taken[index])
        row: Row = self.rows[number]
        folder = self.rows.folder(number) if isinstance(self.rows, ParquetRows) else self.folder
        return to_utterance(row, number, self.columns, self.config, folder)

    def iter_from(self, start: int) -> Iterator[Utterance]:
        """The utterances from `start` on."""
        return (self[number] for number in range(start, len(self)))

    def column(self, name: str | None) -> list[Any]:
        """One column, read without the others and as `to_utterance` reads it; None where absent."""
        if name is None:
            return [None] * len(self)
        columns = self.columns
        read = {
            columns.text: cell_text,
            columns.id: cell_name,
            columns.speaker: cell_name,
            columns.recording: cell_name,
            columns.language: cell_language,
            "duration": cell_seconds,
            "offset": cell_seconds,
        }.get(name, lambda cell: cell)
        end = int(self.taken.max(initial=-1)) + 1
        values = list(map(read, islice(_cells(self.rows, name), end)))
        return [values[number] for number in self.taken]

    def label_lengths(self) -> np.ndarray:
        """int32[n]: tokens of each label; -1 where there is none."""
        if isinstance(self.rows, ParquetRows) and self.columns.labelled:
            return self.rows.list_lengths("token_ids")[self.taken]
        ids = self.column("token_ids")
        return np.array([-1 if one is None else len(one) for one in ids], np.int32)

    def follows(self) -> np.ndarray:
        """bool[n]: whether the previous row is the previous utterance of speaker and recording.

        A label store numbers its utterances, which reveals gaps left by filtering; clips of a
        window that was split share a number.
        """
        known = [self.columns.speaker, self.columns.recording]
        if any(offset is not None for offset in self.column("offset")):  # several clips of one file
            known.append(self.columns.audio)
        whose = list(zip(*map(self.column, known), strict=True))
        numbers = self.column(UTTERANCE_NUMBER)
        if not all(isinstance(number, int) for number in numbers):
            numbers = self.taken.tolist()  # rows that were not taken leave gaps
        same = [
            one == two and any(name is not None for name in two) and second in (first, first + 1)
            for (one, two), (first, second) in zip(pairwise(whose), pairwise(numbers), strict=True)
        ]
        return np.array([False, *same])


@dataclass(frozen=True, eq=False)
class UtteranceStream:
    """The utterances of a stream, in its order."""

    rows: Iterable[Row]
    columns: Columns
    config: DataConfig

    def __iter__(self) -> Iterator[Utterance]:
        return self.iter_from(0)

    def iter_from(self, start: int) -> Iterator[Utterance]:
        """The utterances from `start` on; those before are skipped, not decoded.

        The rows are counted, and logged when the stream ends.
        """
        skip = getattr(self.rows, "skip", None)
        rows = skip(start) if skip else islice(self.rows, start, None)
        limit = self.config.limit
        stop = None if limit is None else max(limit - start, 0)
        rows_read = with_text = 0
        for number, row in enumerate(islice(rows, stop), start):
            utterance = to_utterance(row, number, self.columns, self.config)
            rows_read, with_text = rows_read + 1, with_text + bool(utterance.text)
            yield utterance
        notes = (f"read from row {start:,} on",) if start else ()
        logger.info("%s: %s", self.config.source, describe_counts(rows_read, with_text, notes))

    @property
    def shards(self) -> int:
        """Number of parts that can be read independently."""
        return getattr(self.rows, "num_shards", 1)

    def shard(self, index: int) -> Iterator[Utterance]:
        """The utterances of one part."""
        rows: Any = self.rows
        part = rows.shard(self.shards, index) if self.shards > 1 else rows
        for number, row in enumerate(part):
            yield to_utterance(row, f"{index}-{number}", self.columns, self.config)


class Concatenated(Sequence[Utterance]):
    """Several datasets one after the other."""

    def __init__(self, parts: Sequence[Sequence[Utterance]]):
        self.parts = tuple(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index) -> Any:
        number = range(len(self))[index]
        part = bisect_right(self._ends, number)
        return self.parts[part][number - self._ends[part]]  # counted from the part's end


def read_dataset(source: DataConfig | str | Path) -> Utterances | UtteranceStream:
    """The utterances of a hub dataset, folder, manifest, Parquet or label store.

    A stream if `streaming` is set, else a sequence. Columns and the presence of a row are checked
    here, rows when they are read.

    Raises:
        InputError: the dataset is missing, empty or malformed, or lacks a column that is named.
    """
    config = source if isinstance(source, DataConfig) else DataConfig(str(source))
    if config.language is not None:
        config = replace(config, language=to_language_code(config.language))
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit {config.limit} leaves no utterance: use 1 or more")
    table = read_table(config)
    columns = find_columns(table, config)
    if not isinstance(table.rows, Rows):
        return UtteranceStream(table.rows, columns, config)
    if not len(table.rows):
        raise InputError(f"{config.source} is a dataset without rows")
    counts = describe_counts(len(table.rows), _count_texts(table.rows, columns.text), table.notes)
    logger.log(logging.WARNING if table.notes else logging.INFO, "%s: %s", config.source, counts)
    return Utterances(table.rows, columns, config, folder=table.folder)


def describe_counts(rows: int, with_text: int, notes: Sequence[str]) -> str:
    """What was read of a dataset: counts of rows and texts, and notes."""
    counts = f"{rows:,} row{'s' * (rows != 1)}, {with_text:,} with text"
    if without := rows - with_text:
        counts += f", {without:,} without"
    return "; ".join((counts, *notes))


def _cells(rows: Any, name: str) -> Iterable[Any]:
    """One column of a table, read without the others where it can be; None where absent."""
    if isinstance(rows, ParquetRows | TarRows):
        return rows.column(name)
    if hasattr(rows, "select_columns") and name in rows.column_names:  # of `datasets`
        parts = rows.select_columns([name]).with_format("arrow").iter(1_000)
        return (value for part in parts for value in part[name].to_pylist())
    return (row.get(name) for row in rows)


def _count_texts(rows: Any, column: str | None) -> int:
    """Number of rows with a text, of Parquet by its statistics."""
    if column is None:
        return 0
    if isinstance(rows, ParquetRows):
        return len(rows) - rows.null_count(column)
    return sum(cell_text(value) is not None for value in _cells(rows, column))


def to_utterance(
    row: Row, number: int | str, columns: Columns, config: DataConfig, folder: str | None = None
) -> Utterance:
    """One row as an utterance; a cell of the wrong kind becomes its `fault`.

    number: the id of a row without id and path. folder: the start of relative paths.
    """
    cells: Any = row  # a column that is missing has the name None, and no cell
    audio, path, rate = cell_audio(row.get(columns.audio), row)
    if isinstance(audio, str) and folder is not None and is_relative(audio):
        base, omitted = audio_base(folder, [audio])
        audio = join(base, audio + omitted)
    offset, previous = cell_seconds(row.get("offset")), row.get("condition_on_prev")
    if isinstance(previous, bool | int):  # a flag of a dataset that is not labelled yet
        previous = None
    states = row.get("teacher_states")
    speech = config.speech and cell_bool(row.get("speech"))
    return Utterance(
        id=cell_name(cells.get(columns.id)) or (path and escape(path)) or str(number),
        audio=audio,
        text=cell_text(cells.get(columns.text)) if speech else "",
        duration=cell_seconds(row.get("duration")),
        speaker=cell_name(cells.get(columns.speaker)),
        language=cell_language(cells.get(columns.language)) or config.language,
        offset=offset,
        format="g722" if path and path.lower().endswith(".g722") else None,
        rate=rate,
        token_ids=cell_tokens(row.get("token_ids")),
        teacher_states=None if states is None else np.asarray(states, np.float16),
        transcript=cell_text(cells.get(columns.transcript)),
        previous=cell_text(previous) if isinstance(previous, str) else cell_tokens(previous),
        recording=cell_name(cells.get(columns.recording))
        or (escape(os.path.basename(path)) if path and offset is not None else None),
        ended=cell_bool(row.get("ended")),
        speech=speech,
        fault=_fault(row, number, columns, config.source),
    )


def _fault(row: Row, number: int | str, columns: Columns, source: str) -> str | None:
    """The error in a row with a cell of the wrong kind."""
    for column, read, expected in (
        ("duration", cell_seconds, "must be seconds"),
        ("offset", cell_seconds, "must be seconds"),
        ("token_ids", cell_tokens, "must be a list of integers"),
        (columns.text, cell_text, "must be text"),
    ):
        value = None if column is None else row.get(column)
        if read(value) is None and not is_missing(value) and str(value).strip():
            return f"{source} row {number} has {column} {reprlib.repr(value)}: it {expected}"
    return None


def continues(utterance: Utterance, before: Utterance | None) -> bool:
    """Whether `before`, which was read before, has the same known speaker and recording."""
    if before is None:
        return False
    origin = (utterance.speaker, utterance.recording)
    return origin == (before.speaker, before.recording) and origin != (None, None)


def load_waveform(utterance: Utterance, longest: float | None = None) -> Float32[np.ndarray, "n"]:
    """The clip's samples at 16 kHz in [-1, 1], at most `longest` seconds of them.

    Packed windows are decoded by `windows.decode_clips`.

    Raises:
        AudioError: the clip cannot be decoded.
    """
    if utterance.fault:
        raise AudioError(utterance.fault)
    source, offset = utterance.audio, utterance.offset
    limits = (longest, None if offset is None else utterance.duration or None)
    duration = min((seconds for seconds in limits if seconds is not None), default=None)
    if isinstance(source, np.ndarray):
        rate = utterance.rate or SAMPLE_RATE
        return array_to_waveform(source, rate, utterance.id, offset, duration)
    if isinstance(source, str) and is_url(source):
        try:
            source = read_file(source)
        except OSError as error:
            raise AudioError(f"cannot read {utterance.audio}: {error}") from None
    if not source:
        raise AudioError(f"{utterance.id}: the row holds no audio")
    return load_audio(source, format=utterance.format, offset=offset, duration=duration)
