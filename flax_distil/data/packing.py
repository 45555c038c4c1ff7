"""Short utterances concatenated to windows: clips of 7 s leave three quarters of a window silent.

Every encoder pass costs 30 s, whatever the window holds. So consecutive utterances of one speaker
and language share one, as in the later published recipes (distil-large-v3).
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioError, audio_duration
from flax_distil.cache import cache_folder
from flax_distil.config import DataConfig
from flax_distil.data.utterances import Utterance, Utterances
from flax_distil.errors import InputError

HEADERS_AT_ONCE = 8  # files that are opened to learn their durations
HEADERS_KEPT = 1000  # so many or more are remembered; fewer take less than a second


@dataclass(frozen=True)
class Packed(Sequence[Utterance]):
    """Windows over a dataset: `groups` are the rows of each, spoken `pause` seconds apart."""

    utterances: Utterances
    groups: Sequence[tuple[int, ...]]
    pause: float
    seconds: Float64[np.ndarray, "n"]
    """Of each row, as they were planned with; NaN of one that cannot be read."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return join_parts(tuple(self._part(row) for row in self.groups[index]), self.pause)

    def _part(self, row: int) -> Utterance:
        """A row with the duration that its header told, so that nobody reads that again."""
        part, seconds = self.utterances[row], float(self.seconds[row])
        if part.duration is not None or part.offset is not None or math.isnan(seconds):
            return part
        return replace(part, duration=seconds)

    def iter_from(self, start: int) -> Iterator[Utterance]:
        """The windows from `start` on."""
        return (self[number] for number in range(start, len(self)))

    def follows(self) -> np.ndarray:
        """bool[n]: whether each window goes on where the one before ends; see `Utterances`."""
        rows = self.utterances.follows()
        joints = pairwise(self.groups)
        return np.array(
            [False, *(rows[two[0]] and one[-1] == two[0] - 1 for one, two in joints)], bool
        )


def pack(utterances: Utterances, seconds: float, pause: float) -> Packed:
    """Windows of at most `seconds`, in the order of their first utterances.

    Utterances of a speaker, recording and language keep their order; a new window begins where the
    next one does not fit. Those whose speaker is not known are taken for one speaker's.
    Raises InputError for windows that no encoder pass holds.
    """
    if not 0 < seconds <= CLIP_SAMPLES / SAMPLE_RATE:
        most = CLIP_SAMPLES // SAMPLE_RATE
        raise InputError(f"pack_seconds is {seconds:g}: a window has at most {most} s")
    if pause < 0:
        raise InputError(f"pack_pause is {pause:g} s: it must not be negative")
    groups: list[list[int]] = []
    open_groups: dict[tuple[str | None, ...], tuple[list[int], float]] = {}
    planned = durations(utterances)
    for row, key in enumerate(pack_keys(utterances)):
        duration = seconds if math.isnan(planned[row]) else min(planned[row], seconds)
        group, filled = open_groups.get(key, ([], 0.0))
        if not group or filled + pause + duration > seconds + 1e-6:
            group, filled = [], -pause
            groups.append(group)
        group.append(row)
        open_groups[key] = (group, filled + pause + duration)
    return Packed(utterances, [tuple(group) for group in groups], pause, planned)


def pack_keys(utterances: Utterances) -> list[tuple[str | None, ...]]:
    """Speaker, recording and language of each row, read without its audio."""
    columns, default = utterances.columns, utterances.config.language
    read = lambda name: utterances.column(name) if name else [None] * len(utterances)
    recordings = read(columns.recording)
    offsets = utterances.column("offset")
    if any(offset is not None for offset in offsets):  # several clips of one file
        recordings = [
            utterances[row].recording if offset is not None and recording is None else recording
            for row, (offset, recording) in enumerate(zip(offsets, recordings, strict=True))
        ]
    languages = [language or default for language in read(columns.language)]
    return list(zip(read(columns.speaker), recordings, languages, strict=True))


def durations(utterances: Utterances) -> Float64[np.ndarray, "n"]:
    """Seconds of each row, as the dataset tells; else of its header, and NaN where that fails.

    Many headers are read once: what they told is kept in the cache.
    """
    told = utterances.column("duration")
    found = np.array([math.nan if value is None else value for value in told], np.float64)
    silent = [row for row, value in enumerate(told) if value is None]
    if not silent:
        return found
    path = None
    if len(silent) >= HEADERS_KEPT:
        path = cache_folder() / "durations" / f"{identity_digest(utterances)}.npy"
        with suppress(OSError, ValueError):
            kept = np.load(path, allow_pickle=False)
            if kept.shape == (len(silent),):
                found[silent] = kept
                return found
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        read = lambda row: clip_seconds(utterances[row], unknown=math.nan)
        for start in range(0, len(silent), HEADERS_AT_ONCE * 64):
            rows = silent[start : start + HEADERS_AT_ONCE * 64]
            found[rows] = list(pool.map(read, rows))
    if path is not None:
        save_durations(path, found[silent])
    return found


def save_durations(path: Path, seconds: Float64[np.ndarray, "n"]) -> None:
    """Put the durations into the cache, where it can be written to."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, seconds)
        partial.replace(path)


def identity(utterances: Any) -> tuple[Any, ...]:
    """What decides which sound each clip of a dataset has, without reading any: where the dataset
    is and how it is read, ids, paths, offsets and durations of its rows, and its windows."""
    rows, windows = utterances, None
    if isinstance(utterances, Packed):
        rows, windows = utterances.utterances, (tuple(utterances.groups), utterances.pause)
    data = {field.name: getattr(rows.config, field.name) for field in fields(DataConfig)}
    if Path(data["source"]).exists():  # the same relative path is another one elsewhere
        data["source"] = str(Path(data["source"]).resolve())
    names = [rows.columns.id, "offset", "duration"]
    if isinstance(rows.rows[0].get(rows.columns.audio), str):  # a path; contents stay unread
        names.append(rows.columns.audio)
    return data, [rows.column(name) for name in names if name], windows


def identity_digest(utterances: Utterances) -> str:
    """A name for the dataset as it is now: another file in its place has another time."""
    source, stamp = Path(utterances.config.source), None
    with suppress(OSError, ValueError):
        about = source.stat()
        stamp = (about.st_mtime_ns, about.st_size)
    contents = repr((identity(utterances), stamp, getattr(utterances.rows, "_fingerprint", None)))
    return hashlib.sha256(contents.encode(errors="surrogateescape")).hexdigest()[:32]


def join_parts(parts: tuple[Utterance, ...], pause: float) -> Utterance:
    """One utterance of several, with all their words."""
    first, *rest = parts
    if not rest:
        return first
    texts, told = [part.text for part in parts], [part.duration for part in parts]
    return Utterance(
        id=f"{first.id}+{len(rest)}",
        audio=b"",
        text=None if None in texts else " ".join(filter(None, texts)),
        duration=None if None in told else sum(told) + pause * len(rest),  # type: ignore[arg-type]
        speaker=first.speaker,
        language=first.language,
        ended=parts[-1].ended,
        speech=any(part.speech for part in parts),
        parts=parts,
        pause=pause,
        recording=first.recording,
    )


def with_durations(window: Utterance, seconds: Sequence[float | None]) -> Utterance:
    """A window with the durations that its parts have, without those of None."""
    pairs = zip(window.parts, seconds, strict=False)
    parts = tuple(replace(part, duration=one) for part, one in pairs if one is not None)
    found = join_parts(parts, window.pause)
    return replace(found, id=window.id) if len(parts) == len(window.parts) else found


def part_offsets(window: Utterance) -> list[float]:
    """Second at which each part of a window begins."""
    lengths = [clip_seconds(part) + window.pause for part in window.parts]
    return [0.0, *accumulate(lengths[:-1])]


def clip_seconds(utterance: Utterance, unknown: float = 0.0) -> float:
    """Seconds, read from the audio's header where the dataset does not tell.

    A clip that cannot be read counts as `unknown`; whoever hears it will say why.
    """
    if utterance.duration is not None:
        return utterance.duration
    if isinstance(utterance.audio, np.ndarray):
        seconds = max(utterance.audio.shape, default=0) / (utterance.rate or SAMPLE_RATE)
    else:
        try:
            seconds = audio_duration(utterance.audio, utterance.format)
        except AudioError:
            return unknown
    return max(seconds - (utterance.offset or 0.0), 0.0) or unknown
