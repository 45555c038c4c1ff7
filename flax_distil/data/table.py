"""A table of rows, which every source is read as, and the meaning of its columns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax_distil.config import DataConfig
from flax_distil.errors import InputError

Row = dict[str, Any]

# fmt: off
# Formats of recorded speech that FFmpeg can open, with those of videos.
AUDIO_SUFFIXES = frozenset((
    ".3ga", ".3gp", ".aa", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi",
    ".caf", ".dts", ".f4a", ".flac", ".flv", ".g722", ".gsm", ".m2ts", ".m4a", ".m4b", ".m4v",
    ".mka", ".mkv", ".mov", ".mp1", ".mp2", ".mp3", ".mp4", ".mpeg", ".mpg", ".mpga", ".mts",
    ".nist", ".oga", ".ogg", ".ogv", ".opus", ".rf64", ".snd", ".sph", ".spx", ".tak", ".ts",
    ".tta", ".voc", ".w64", ".wav", ".wave", ".weba", ".webm", ".wma", ".wmv", ".wv",
))
# fmt: on

# The usual names of columns, in the order they are looked for.
FILE_COLUMNS = ("file_name", "audio", "audio_filepath", "audio_path", "path", "file")
AUDIO = ("audio", *FILE_COLUMNS)
TEXT = ("text", "sentence", "transcription", "transcript", "normalized_text", "reference")
ID = ("id", "utterance_id", "segment_id", "file_name")
SPEAKER = ("speaker", "speaker_id", "client_id")
LANGUAGE = ("language", "lang", "locale")
RECORDING = ("recording", "recording_id", "chapter_id", "session_id", "meeting_id")
TRANSCRIPT = ("whisper_transcript",)  # in distil-whisper's label sets and ours

# In a label store: the utterance's number in the dataset that was labelled.
UTTERANCE_NUMBER = "utterance_number"


@runtime_checkable
class Rows(Protocol):
    """Rows with a length: a list, those of Parquet files, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Table:
    """Rows of one dataset; those of a stream have no length."""

    columns: tuple[str, ...]
    rows: Rows | Iterable[Row]
    notes: tuple[str, ...] = ()
    """What its reader left out, added or corrected, with counts."""
    folder: Path | None = None
    """The folder that relative paths in its cells start at."""


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns by their meaning."""

    audio: str
    text: str | None
    id: str | None
    speaker: str | None
    language: str | None
    recording: str | None
    labelled: bool
    """Whether it has pseudo-labels as token ids."""
    transcript: str | None = None
    """Pseudo-labels as text."""


@dataclass(frozen=True)
class Counts:
    """Counts of a dataset's rows."""

    rows: int
    with_text: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = f"{self.rows:,} row" + "s" * (self.rows != 1)
        counts = f"{rows}, {self.with_text:,} with text"
        if without := self.rows - self.with_text:
            counts += f", {without:,} without"
        return "; ".join((counts, *self.notes))


def usual_columns(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """The column of each meaning for which `config` names none → its usual names."""
    texts = tuple(name for name in TEXT if name != config.transcript_column)
    kinds = ((config.audio_column, AUDIO), (config.text_column, texts))
    kinds += ((config.speaker_column, SPEAKER), (config.language_column, LANGUAGE))
    kinds += ((config.recording_column, RECORDING),)
    return {usual[0]: usual for named, usual in kinds if named is None}


def find_columns(table: Table, config: DataConfig) -> Columns:
    """The columns that `config` names, else those with the usual names.

    Raises:
        InputError: a column that is named is missing, or no column holds audio.
    """

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
            f"{config.source} has no column that looks like audio ({', '.join(FILE_COLUMNS)}); it "
            f"has {', '.join(table.columns)}: name one as audio_column"
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
