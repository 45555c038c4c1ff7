"""Utterances: one clip of speech each, whatever file or dataset it lies in."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from flax_distil.audio.load import SAMPLE_RATE, AudioError, load_audio
from flax_distil.config import DataConfig
from flax_distil.data.sources import FILE_COLUMNS, ParquetRows, Row, Table, read_table
from flax_distil.data.stored_teacher import StoredTeacher, read_stored
from flax_distil.errors import InputError
from flax_distil.text.languages import to_language_code

# The usual names, in the order they are looked for.
AUDIO = ("audio", *FILE_COLUMNS)
TEXT = ("text", "sentence", "transcription", "transcript", "normalized_text", "reference")
ID = ("id", "utterance_id", "segment_id", "file_name")
SPEAKER = ("speaker", "speaker_id", "client_id")
LANGUAGE = ("language", "lang", "locale")
RECORDING = ("recording", "recording_id", "chapter_id", "session_id", "meeting_id")
TRANSCRIPT = ("whisper_transcript",)  # of distil-whisper's label sets, and of ours

# Place of an utterance in the dataset that was labelled, in a label store.
NUMBER = "utterance_number"


@dataclass(frozen=True)
class Utterance:
    """One clip of speech and what is known about it; the audio is not decoded yet."""

    id: str
    audio: str | bytes | np.ndarray = field(repr=False)
    """Path or address, contents of a file, or 16 kHz mono samples in [-1, 1]."""
    text: str | None = None
    """The reference."""
    duration: float | None = None
    """Seconds, as far as the source tells; the length to cut where there is an `offset`."""
    speaker: str | None = None
    language: str | None = None
    """As the source writes it; `to_language` makes a code of it."""
    offset: float | None = None
    """Seconds into a longer recording where the clip starts; None is all of the audio."""
    format: str | None = None
    """Container of bytes that do not tell it themselves, such as g722."""
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    """The teacher's label, where the source is a label store: no prompt, no end of text."""
    stored: StoredTeacher | None = field(default=None, repr=False)
    """The teacher's distributions at the label's tokens, where the label store holds them."""
    transcript: str | None = field(default=None, repr=False)
    """The teacher's label as text, its timestamps and special tokens written out (`<|0.00|>`)."""
    previous: str | tuple[int, ...] | None = field(default=None, repr=False)
    """What that label was conditioned on (`condition_on_prev`): text, or the teacher's token ids,
    which distil-whisper's label sets begin with `<|startofprev|>`."""
    recording: str | None = None
    """The recording, chapter or session it is a part of; the file, where it has an `offset`."""
    ended: bool = True
    """Whether the label ended by itself; False where it was cut at the longest label."""
    speech: bool = True
    """Whether anybody speaks; False for silence, noise and music, whose text is empty."""
    parts: tuple["Utterance", ...] = field(default=(), repr=False)
    """What a packed window is made of; its audio is then theirs, `pause` seconds apart."""
    pause: float = 0.0


@dataclass(frozen=True)
class Skipped:
    """An utterance that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds what."""

    audio: str
    text: str | None
    id: str | None
    speaker: str | None
    language: str | None
    recording: str | None
    labelled: bool
    """Whether there are pseudo-labels as token ids."""
    transcript: str | None = None
    """Pseudo-labels as text."""


class Utterances(Sequence[Utterance]):
    """The utterances of a table that has a length; rows are read when they are asked for.

    taken: numbers of the rows that are meant, all where None.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        columns: Columns,
        config: DataConfig,
        taken: Int[np.ndarray, "n"] | None = None,
    ):
        self.rows, self.columns, self.config, self.taken = rows, columns, config, taken
        self._size = len(rows) if config.limit is None else min(config.limit, len(rows))

    def take(self, numbers: Int[np.ndarray, "n"]) -> "Utterances":
        """These utterances alone, by their numbers here, as a dataset."""
        taken = numbers if self.taken is None else self.taken[numbers]
        return Utterances(self.rows, self.columns, self.config, taken)

    def __len__(self) -> int:
        return self._size if self.taken is None else len(self.taken)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        number = number if self.taken is None else int(self.taken[number])
        return to_utterance(self.rows[number], number, self.columns, self.config)

    def since(self, start: int) -> Iterator[Utterance]:
        """The utterances from `start` on."""
        return (self[number] for number in range(start, len(self)))

    def column(self, name: str) -> list[Any]:
        """One column, read without the others; None where a row lacks it."""
        values = self._column(name)
        return values if self.taken is None else [values[number] for number in self.taken]

    def _column(self, name: str) -> list[Any]:
        rows: Any = self.rows
        if isinstance(rows, ParquetRows):
            if name not in rows.columns:
                return [None] * self._size
            return [value for part in rows.column(name) for value in part.to_pylist()][: self._size]
        if hasattr(rows, "select_columns"):  # of `datasets`
            if name not in rows.column_names:
                return [None] * self._size
            rows = rows.select_columns([name])
        return [rows[number].get(name) for number in range(self._size)]

    def label_lengths(self) -> np.ndarray:
        """int32[n]: tokens of each label, read without the audio; -1 where there is none."""
        if isinstance(self.rows, ParquetRows) and self.columns.labelled:
            lengths = self.rows.list_lengths("token_ids")[: self._size]
            return lengths if self.taken is None else lengths[self.taken]
        ids = self.column("token_ids")
        return np.array([-1 if one is None else len(one) for one in ids], np.int32)

    def follows(self) -> np.ndarray:
        """bool[n]: whether the row before is the utterance before, of speaker and recording.

        A label store numbers its utterances, so that a gap left by filtering is seen.
        """
        known = [name for name in (self.columns.speaker, self.columns.recording) if name]
        offsets = self.column("offset")
        if any(offset is not None for offset in offsets):  # several clips of one file
            known.append(self.columns.audio)
        if not known:
            return np.zeros(len(self), bool)
        whose = list(zip(*(self.column(name) for name in known), strict=True))
        numbers = self.column(NUMBER)
        if None in numbers and self.taken is not None:  # a gap left by what was not taken
            numbers = self.taken.tolist()
        same = [False]
        for (one, two), (first, second) in zip(pairwise(whose), pairwise(numbers), strict=True):
            adjacent = None in (first, second) or second == first + 1
            same.append(adjacent and one == two and any(name is not None for name in two))
        return np.array(same)


class UtteranceStream:
    """The utterances of a stream: any number of them, from a position on, in the stream's order."""

    def __init__(self, rows: Iterable[Row], columns: Columns, config: DataConfig):
        self.rows, self.columns, self.config = rows, columns, config

    def __iter__(self) -> Iterator[Utterance]:
        return self.since(0)

    def since(self, start: int) -> Iterator[Utterance]:
        """The utterances from `start` on; what lies before is passed over, not decoded."""
        skip = getattr(self.rows, "skip", None)
        rows = skip(start) if skip else islice(self.rows, start, None)
        for number, row in enumerate(islice(rows, self._left(start)), start):
            yield to_utterance(row, number, self.columns, self.config)

    @property
    def shards(self) -> int:
        """How many parts it can be read in, each by itself."""
        return getattr(self.rows, "num_shards", 1)

    def shard(self, index: int) -> Iterator[Utterance]:
        """The utterances of one part."""
        rows: Any = self.rows
        part = rows.shard(self.shards, index) if self.shards > 1 else rows
        for number, row in enumerate(part):
            yield to_utterance(row, f"{index}-{number}", self.columns, self.config)

    def _left(self, start: int) -> int | None:
        return None if self.config.limit is None else max(self.config.limit - start, 0)


class Joined(Sequence[Utterance]):
    """Several datasets one after the other."""

    def __init__(self, parts: Sequence[Sequence[Utterance]]):
        self.parts = tuple(parts)
        self._places = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def __len__(self) -> int:
        return int(self._places[-1])

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = int(np.searchsorted(self._places, number, side="right")) - 1
        return self.parts[part][number - int(self._places[part])]


def read_dataset(source: DataConfig | str | Path) -> Utterances | UtteranceStream:
    """The utterances of a hub dataset, folder, manifest, Parquet or label store.

    A stream where `streaming` is set, a sequence otherwise. Rows are checked when they are read,
    the columns and the presence of at least one row now.
    Raises InputError for what is missing, empty, malformed, or lacks a column that was named.
    """
    config = source if isinstance(source, DataConfig) else DataConfig(str(source))
    if config.language is not None:
        to_language(config.language)
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit {config.limit} leaves no utterance: use 1 or more")
    try:
        table = read_table(config)
    except UnicodeDecodeError as error:
        raise InputError(f"{config.source} is no UTF-8 text: {error}") from None
    columns = find_columns(table, config)
    if not hasattr(table.rows, "__len__"):
        return UtteranceStream(table.rows, columns, config)
    utterances = Utterances(table.rows, columns, config)  # type: ignore[arg-type]
    if not len(utterances):
        raise InputError(f"{config.source} is a dataset without rows")
    return utterances


def find_columns(table: Table, config: DataConfig) -> Columns:
    """The columns that were named, else the usual names that are there."""

    def find(named: str | None, usual: Sequence[str], kind: str) -> str | None:
        if named is None:
            return next((name for name in usual if name in table.columns), None)
        if named not in table.columns:
            raise InputError(
                f"{config.source} has no {kind} column {named}; it has {', '.join(table.columns)}"
            )
        return named

    audio = find(config.audio_column, AUDIO, "audio")
    if audio is None:
        raise InputError(
            f"{config.source} has no column that looks like audio ({', '.join(AUDIO)}); it has "
            f"{', '.join(table.columns)}: name one as audio_column"
        )
    transcript = find(config.transcript_column, TRANSCRIPT, "transcript")
    text = find(config.text_column, [name for name in TEXT if name != transcript], "text")
    if text is not None and text == transcript:
        raise InputError(
            f"{config.source}: {text} holds a teacher's labels, it is the transcript_column; name "
            "the references as text_column, or leave it out"
        )
    return Columns(
        audio=audio,
        text=text,
        id=find(config.id_column, ID, "id"),
        speaker=find(config.speaker_column, SPEAKER, "speaker"),
        language=find(config.language_column, LANGUAGE, "language"),
        recording=find(config.recording_column, RECORDING, "recording"),
        labelled="token_ids" in table.columns,
        transcript=transcript,
    )


def to_utterance(row: Row, number: int | str, columns: Columns, config: DataConfig) -> Utterance:
    """One row as an utterance; `number` names it where nothing else does."""

    def text(column: str | None) -> str | None:
        value = None if column is None else row.get(column)
        return None if value is None else str(value)

    def seconds(column: str) -> float | None:
        if (value := row.get(column)) is None:
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not 0 <= found < math.inf:
            raise InputError(
                f"{config.source} row {number} has {column} {value!r}: it must be seconds"
            )
        return found

    audio, path = _audio(row.get(columns.audio))
    suffix = Path(path or "").suffix.lower().lstrip(".")
    offset, tokens, previous = seconds("offset"), row.get("token_ids"), row.get("condition_on_prev")
    if previous is not None and not isinstance(previous, str):
        # Before labelling, distil-whisper's column says whether a clip follows on the one before.
        previous = None if isinstance(previous, bool | int) else tuple(map(int, previous))
    speech = config.speech and truth(row.get("speech"))
    return Utterance(
        id=text(columns.id) or path or str(number),
        audio=audio,
        text=text(columns.text) if speech else "",
        duration=seconds("duration"),
        speaker=text(columns.speaker),
        language=text(columns.language) or config.language,
        offset=offset,
        format="g722" if suffix == "g722" else None,
        token_ids=None if tokens is None else tuple(tokens),
        stored=read_stored(row),
        transcript=text(columns.transcript),
        previous=previous,
        recording=text(columns.recording)
        or (Path(path).name if path and offset is not None else None),
        ended=truth(row.get("ended")),
        speech=speech,
    )


def truth(value: Any) -> bool:
    """False for what a column of yes and no writes as no; True for all else and for nothing."""
    if isinstance(value, str):
        return value.strip().lower() not in ("false", "no", "0")
    return not (isinstance(value, bool | int | float | np.bool_) and value == 0)


def follows(utterance: Utterance, before: Utterance | None) -> bool:
    """Whether `before`, the one read before, is of the same known speaker or recording."""
    if before is None:
        return False
    whose, theirs = ((one.speaker, one.recording) for one in (utterance, before))
    return whose == theirs and whose != (None, None)


def _audio(value: Any) -> tuple[str | bytes | np.ndarray, str | None]:
    """What a cell of an audio column holds, and the path it names; empty bytes where nothing."""
    if isinstance(value, dict):  # Hugging Face's {bytes, path}; embedded bytes come first
        path = value.get("path")
        return value.get("bytes") or path or b"", path
    if isinstance(value, str | Path):
        return str(value), str(value)
    if isinstance(value, bytes | np.ndarray):
        return value, None
    return b"", None


def to_language(language: str) -> str:
    """Whisper's code of a language, region aside: `"English"`, `"en-US"`, `"en_us"` → `"en"`."""
    try:
        return to_language_code(language)
    except InputError:
        if len(head := language.replace("_", "-").partition("-")[0]) in (2, 3):
            return to_language_code(head)
        raise


def listen(utterance: Utterance, longest: float | None = None) -> Float32[np.ndarray, "n"]:
    """The clip's samples at 16 kHz in [-1, 1], at most `longest` seconds of them.

    Raises AudioError when there are none.
    """
    if utterance.parts:
        silence = np.zeros(round(utterance.pause * SAMPLE_RATE), np.float32)
        pieces = [piece for part in utterance.parts for piece in (silence, listen(part, longest))]
        return np.concatenate(pieces[1:])
    source, offset = utterance.audio, utterance.offset
    known = (longest, None if offset is None else utterance.duration or None)
    duration = min((seconds for seconds in known if seconds is not None), default=None)
    if isinstance(source, np.ndarray):
        start = round((offset or 0) * SAMPLE_RATE)
        end = None if duration is None else start + round(duration * SAMPLE_RATE)
        if offset is not None and start >= len(source):
            raise AudioError(
                f"{utterance.id}: it starts at {offset:g} s, and the audio ends at "
                f"{len(source) / SAMPLE_RATE:g} s"
            )
        return source[start:end]
    if isinstance(source, str) and "://" in source:
        source = _download(source)
    if not source:
        raise AudioError(f"{utterance.id}: the row holds no audio")
    return load_audio(source, format=utterance.format, offset=offset, duration=duration)


def _download(address: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(address) as file:
            return file.read()  # type: ignore[union-attr]
    except OSError as error:
        raise AudioError(f"{address} cannot be read: {error}") from None
