"""Values of a row's cells: names, texts, times, audio. None stands for a missing value."""

import base64
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.container import RATES
from flax_distil.audio.load import SAMPLE_RATE, AudioError, full_scale
from flax_distil.audio.samples import SampleBlock, mix_to_mono, resample, split_seconds
from flax_distil.data.table import Row
from flax_distil.errors import InputError
from flax_distil.text.languages import to_language_code

UNWRITABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
NO_TEXT = re.compile("[\x00\ud800-\udfff]")


def escape(name: str) -> str:
    r"""A name that can be written to any file: `\udce9` for a byte that is not UTF-8, `\n` for a
    line break. Files are opened by the original name."""
    return UNWRITABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def cell_name(value: Any) -> str | None:
    """An id, speaker or recording as a string that can be written."""
    text = _string(value)
    return None if text is None else escape(text)


def cell_text(value: Any) -> str | None:
    """A text, with U+FFFD for characters that are not text."""
    text = _string(value)
    return None if text is None else NO_TEXT.sub("\ufffd", text)


def cell_language(value: Any) -> str | None:
    """Whisper's code of a language; the text itself where Whisper does not have the language."""
    text = cell_name(value)
    try:
        return text and to_language_code(text)
    except InputError:
        return text


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _string(value: Any) -> str | None:
    if is_missing(value) or isinstance(value, list | tuple | dict | np.ndarray):
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def cell_seconds(value: Any) -> float | None:
    """A time in seconds; None for any other value."""
    try:
        seconds = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    return seconds if 0 <= seconds < math.inf else None


def cell_number(value: Any) -> int | None:
    """An integer; None for any other value."""
    return value if isinstance(value, int) else None


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
        if isinstance(contents, str):  # in JSON
            contents = _base64(contents)
        value = contents or (path if samples is None else samples)
    if isinstance(value, list | np.ndarray):
        known = (rate, row.get("sampling_rate"), row.get("sample_rate"))
        rate = next((one for one in known if one is not None), None)
        return _array(value), path, rate
    if isinstance(value, str | Path):
        return str(value), str(value), None
    return (value if isinstance(value, bytes) else b""), path, None


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def _array(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError:  # lists of different lengths
        return np.zeros(0, object)


def resolve_path(path: str, folder: Path | None) -> str:
    """The path of a file that a row names, relative to the table's folder or its parent."""
    if folder is None or "://" in path or os.path.isabs(path):
        return path
    bases = (folder, folder.parent, Path())
    return str(next((base for base in bases if os.path.isfile(base / path)), folder) / path)


def array_to_waveform(samples: np.ndarray, rate: float, name: str) -> Float32[np.ndarray, "n"]:
    """A dataset's array of samples as a mono waveform at 16 kHz in [-1, 1].

    samples: [n], [channels, n] or [n, channels]; integers have 16 bits where all fit, else 32.
    rate: Hz.

    Raises:
        AudioError: the array is not audio.
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
    if not channels.size or not np.isfinite(channels).all():
        raise AudioError(f"{name}: there are no samples, or they hold NaN or infinity")
    whole = SampleBlock(int(rate), 0, np.ascontiguousarray(channels, np.float32))
    mono = (mix_to_mono(chunk)[0] for chunk in split_seconds([whole]))
    waveform = np.concatenate([chunk.samples[0] for chunk in resample(mono, SAMPLE_RATE)])
    return full_scale(waveform, float(np.abs(waveform).max(initial=0)), name)
