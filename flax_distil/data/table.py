"""A table of rows, which every source is read as, and the meaning of its columns and cells.

None stands for a missing value.
"""

import base64
import io
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.container import RATES
from flax_distil.audio.load import AudioError, load_audio
from flax_distil.config import DataConfig
from flax_distil.errors import InputError
from flax_distil.text.languages import to_language_code

Row = dict[str, Any]
PlacedRow = tuple[str, Row]
"""A row and its place in its file, such as "line 2"."""

# Formats of recorded speech that FFmpeg can open, with those of videos.
SUFFIXES = """
.3ga .3gp .aa .aac .ac3 .aif .aifc .aiff .amr .ape .au .avi .caf .dts .f4a .flac .flv .g722 .gsm
.m2ts .m4a .m4b .m4v .mka .mkv .mov .mp1 .mp2 .mp3 .mp4 .mpeg .mpg .mpga .mts .nist .oga .ogg .ogv
.opus .rf64 .snd .sph .spx .tak .ts .tta .voc .w64 .wav .wave .weba .webm .wma .wmv .wv
"""
AUDIO_SUFFIXES = frozenset(SUFFIXES.split())

# The usual names of columns by their meaning, in the order they are looked for.
USUAL = {
    "audio": ("audio", "file_name", "audio_filepath", "audio_path", "path", "file"),
    "text": ("text", "sentence", "transcription", "transcript", "normalized_text", "reference"),
    "id": ("id", "utterance_id", "segment_id", "file_name"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "recording": ("recording", "recording_id", "chapter_id", "session_id", "meeting_id"),
    "transcript": ("whisper_transcript",),  # in distil-whisper's label sets and ours
}

# In a label store: the utterance's number in the dataset that was labelled.
UTTERANCE_NUMBER = "utterance_number"

UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
NO_TEXT = re.compile("[\x00\ud800-\udfff]")


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
    folder: str | None = None
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


def find_columns(table: Table, config: DataConfig) -> Columns:
    """The columns that `config` names, else those with the usual names.

    Raises:
        InputError: a column that is named is missing, or no column holds audio.
    """

    def find(kind: str, other: str | None = None) -> str | None:
        named = getattr(config, f"{kind}_column")
        if named is None:
            usual = (name for name in USUAL[kind] if name != other)
            return next((name for name in usual if name in table.columns), None)
        if named not in table.columns:
            raise InputError(
                f"{config.source} has no {kind} column {named}; it has {', '.join(table.columns)}"
            )
        return named

    audio = find("audio")
    if audio is None:
        raise InputError(
            f"{config.source} has no column that looks like audio ({', '.join(USUAL['audio'])}); "
            f"it has {', '.join(table.columns)}: name one as audio_column"
        )
    transcript = find("transcript")
    text = find("text", other=transcript)
    if text is not None and text == transcript:
        raise InputError(
            f"{config.source}: {text} holds a teacher's labels, it is the transcript_column; name "
            "the references as text_column, or leave it out"
        )
    names = {kind: find(kind) for kind in ("id", "speaker", "language", "recording")}
    return Columns(
        audio, text, **names, labelled="token_ids" in table.columns, transcript=transcript
    )


# --- cells --------------------------------------------------------------------------------------


def escape(name: str) -> str:
    r"""A name that can be written to any file: `\udce9` for a byte that is not UTF-8, `\n` for a
    line break. Files are opened by the original name."""
    return UNWRITABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_text(value: Any) -> str | None:
    """A text, with U+FFFD for characters that are not text."""
    if is_missing(value) or isinstance(value, list | tuple | dict | np.ndarray):
        return None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return NO_TEXT.sub("\ufffd", text)


def cell_name(value: Any) -> str | None:
    """An id, speaker or recording as a string that can be written."""
    text = value if isinstance(value, str) else cell_text(value)
    return None if text is None else escape(text)


def cell_language(value: Any) -> str | None:
    """Whisper's code of a language; the text itself where Whisper does not have the language."""
    text = cell_name(value)
    try:
        return text and to_language_code(text)
    except InputError:
        return text


def cell_seconds(value: Any) -> float | None:
    """A time in seconds; None for any other value."""
    try:
        seconds = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    return seconds if 0 <= seconds < math.inf else None


def cell_tokens(value: Any) -> tuple[int, ...] | None:
    """Token ids as Python integers; None for any other value."""
    try:
        return None if value is None else tuple(np.asarray(value, np.int64).tolist())
    except (TypeError, ValueError, OverflowError):
        return None


def cell_bool(value: Any) -> bool:
    """False for false, no and 0; True for any other value and for an empty cell."""
    if isinstance(value, str):
        return value.strip().lower() not in ("false", "no", "0")
    return not (isinstance(value, bool | int | float | np.bool_) and value == 0)


def cell_audio(value: Any, row: Row) -> tuple[str | bytes | np.ndarray, str | None, float | None]:
    """The contents of an audio cell, the path it names, and the sampling rate of an array."""
    path, rate = None, None
    if isinstance(value, dict):  # Hugging Face's {bytes, path}, or {array, sampling_rate, path}
        path, rate = value.get("path"), value.get("sampling_rate")
        path = path if isinstance(path, str) else None
        samples, contents = value.get("array"), value.get("bytes")
        value = contents or (path if samples is None else samples)
        if isinstance(contents, str):  # in JSON
            try:
                value = base64.b64decode(contents, validate=True)
            except ValueError:
                value = b""
    if isinstance(value, list | np.ndarray):
        known = (rate, row.get("sampling_rate"), row.get("sample_rate"))
        try:
            samples = np.asarray(value)
        except ValueError:  # lists of different lengths
            samples = np.zeros(0, object)
        return samples, path, next((one for one in known if one is not None), None)
    if isinstance(value, str | Path):
        return str(value), str(value), None
    return (value if isinstance(value, bytes) else b""), path, None


def cell_path(value: Any) -> str:
    """The file that an audio cell names and does not contain, or ""."""
    if isinstance(value, dict):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) else ""


def array_to_waveform(
    samples: np.ndarray,
    rate: float,
    name: str,
    offset: float | None = None,
    duration: float | None = None,
) -> Float32[np.ndarray, "n"]:
    """A dataset's array of samples as a mono waveform at 16 kHz in [-1, 1], read as a WAV file.

    samples: [n], [channels, n] or [n, channels]; integers have 16 bits where all fit, else 32.
    rate: Hz. offset, duration: seconds of the part to return.

    Raises:
        AudioError: the array is not audio, or `offset` is behind its end.
    """
    channels = np.atleast_2d(samples)
    if channels.ndim != 2 or channels.dtype.kind not in "iuf" or rate not in RATES:
        raise AudioError(
            f"{name}: an array of {channels.dtype} {samples.shape} at {rate} Hz is not audio: "
            f"store [n] floats in [-1, 1] with a sampling_rate of {RATES.start} to {RATES.stop - 1}"
        )
    channels = channels if len(channels) <= channels.shape[1] else channels.T
    if channels.dtype.kind in "iu":
        scale = 2.0**15 if np.abs(channels).max(initial=0) <= 2**15 else 2.0**31
        channels = channels / scale
    data, width = channels.T.astype("<f4").tobytes(), 4 * len(channels)
    floats = (3, len(channels), int(rate), int(rate) * width, width, 32)
    header = struct.pack("<4sI4s4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16)
    header += struct.pack("<HHIIHH4sI", *floats, b"data", len(data))
    file = io.BytesIO(header + data)
    file.name = name  # in messages
    return load_audio(file, offset=offset, duration=duration)
