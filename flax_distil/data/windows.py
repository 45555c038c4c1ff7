"""Windows of 30 s: short utterances packed into one, clips decoded ahead of time and padded.

The encoder always processes 30 s, of which a clip of 7 s uses a quarter. So consecutive utterances
of one speaker and language can share a window, as in later published recipes (distil-large-v3).
"""

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int16

from flax_distil.audio import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.audio.load import AudioError, audio_duration, to_int16
from flax_distil.cache import cache_folder
from flax_distil.config import DataConfig
from flax_distil.data.utterances import Skipped, Utterance, Utterances, load_waveform
from flax_distil.data.workers import map_in_order
from flax_distil.errors import InputError
from flax_distil.files import write_whole

logger = logging.getLogger(__name__)

HEADERS_AT_ONCE = 8  # files that are opened at a time for their durations
HEADERS_CACHED = 1000  # number from which durations are cached; fewer take less than a second


@dataclass(frozen=True)
class Packed(Sequence):
    """Windows over a dataset. groups: rows of each window. pause: seconds between them."""

    utterances: Utterances
    groups: Sequence[tuple[int, ...]]
    pause: float
    seconds: Float64[np.ndarray, "n"]
    """Durations of the rows that windows were planned with; NaN where unknown."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index) -> Any:
        parts = []
        for row in self.groups[index]:
            part, seconds = self.utterances[row], float(self.seconds[row])
            if part.duration is None and part.offset is None and not math.isnan(seconds):
                part = replace(part, duration=seconds)  # so that its header is not read again
            parts.append(part)
        return join_parts(tuple(parts), self.pause)

    def iter_from(self, start: int) -> Iterator[Utterance]:
        """The windows from `start` on."""
        return (self[number] for number in range(start, len(self)))

    def follows(self) -> np.ndarray:
        """bool[n]: whether each window continues the previous one; see `Utterances.follows`."""
        rows = self.utterances.follows()
        joints = pairwise(self.groups)
        return np.array(
            [False, *(rows[two[0]] and one[-1] == two[0] - 1 for one, two in joints)], bool
        )


def pack(utterances: Utterances, seconds: float, pause: float) -> Packed:
    """Windows of at most `seconds`, in the order of their first utterances.

    Utterances of one speaker, recording and language keep their order; a new window begins where
    the next utterance does not fit. Unknown speakers count as one.

    Raises:
        InputError: `seconds` is not between 0 and 30, or `pause` is negative.
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
        group, used = open_groups.get(key, ([], 0.0))
        if not group or used + pause + duration > seconds + 1e-6:
            group, used = [], -pause
            groups.append(group)
        group.append(row)
        open_groups[key] = (group, used + pause + duration)
    return Packed(utterances, [tuple(group) for group in groups], pause, planned)


def pack_keys(utterances: Utterances) -> list[tuple[str | None, ...]]:
    """Speaker, recording and language of each row, read without its audio."""
    columns, default = utterances.columns, utterances.config.language
    recordings = utterances.column(columns.recording)
    for row, offset in enumerate(utterances.column("offset")):
        if offset is not None and recordings[row] is None:  # one of several clips of a file
            recordings[row] = utterances[row].recording
    languages = [language or default for language in utterances.column(columns.language)]
    return list(zip(utterances.column(columns.speaker), recordings, languages, strict=True))


def durations(utterances: Utterances) -> Float64[np.ndarray, "n"]:
    """Seconds of each row: the dataset's, else those of the header, else NaN.

    Durations of many headers are cached.
    """
    given = utterances.column("duration")
    seconds = np.array([math.nan if value is None else value for value in given], np.float64)
    unknown = [row for row, value in enumerate(given) if value is None]
    if not unknown:
        return seconds
    path = None
    if len(unknown) >= HEADERS_CACHED:
        path = cache_folder() / "durations" / f"{identity_digest(utterances)}.npy"
        with suppress(OSError, ValueError):
            cached = np.load(path, allow_pickle=False)
            if cached.shape == (len(unknown),):
                seconds[unknown] = cached
                return seconds
    read = lambda row: clip_seconds(utterances[row], unknown=math.nan)
    seconds[unknown] = list(map_in_order(read, unknown, HEADERS_AT_ONCE, ahead=64))
    if path is not None:
        with suppress(OSError):  # a cache that cannot be written
            path.parent.mkdir(parents=True, exist_ok=True)
            contents = io.BytesIO()
            np.save(contents, seconds[unknown])
            write_whole(path, contents.getvalue())
    return seconds


def identity(utterances: Any) -> tuple[Any, ...]:
    """What determines the audio of a dataset's clips, without reading it: where the dataset is and
    how it is read, ids, paths, offsets and durations of its rows, and its windows."""
    rows, windows = utterances, None
    if isinstance(utterances, Packed):
        rows, windows = utterances.utterances, (tuple(utterances.groups), utterances.pause)
    data = {field.name: getattr(rows.config, field.name) for field in fields(DataConfig)}
    if Path(data["source"]).exists():  # a relative path depends on the working directory
        data["source"] = str(Path(data["source"]).resolve())
    names = [rows.columns.id, "offset", "duration"]
    if isinstance(rows.rows[0].get(rows.columns.audio), str):  # a path; embedded audio is not read
        names.append(rows.columns.audio)
    return data, [rows.column(name) for name in names if name], windows


def identity_digest(utterances: Utterances) -> str:
    """A hash of the dataset as it is now, with size and time of its file."""
    source, stamp = Path(utterances.config.source), None
    with suppress(OSError, ValueError):
        about = source.stat()
        stamp = (about.st_mtime_ns, about.st_size)
    contents = repr((identity(utterances), stamp, getattr(utterances.rows, "_fingerprint", None)))
    return hashlib.sha256(contents.encode(errors="surrogateescape")).hexdigest()[:32]


def join_parts(parts: tuple[Utterance, ...], pause: float) -> Utterance:
    """One utterance made of several, with all their texts."""
    first, *rest = parts
    if not rest:
        return first
    texts, durations = [part.text for part in parts], [part.duration for part in parts]
    return Utterance(
        id=f"{first.id}+{len(rest)}",
        audio=b"",
        text=None if None in texts else " ".join(filter(None, texts)),
        duration=None if None in durations else sum(durations) + pause * len(rest),  # type: ignore[arg-type]
        speaker=first.speaker,
        language=first.language,
        ended=parts[-1].ended,
        speech=any(part.speech for part in parts),
        parts=parts,
        pause=pause,
        recording=first.recording,
    )


def with_durations(window: Utterance, seconds: Sequence[float | None]) -> Utterance:
    """A window whose parts have these durations, without parts of None."""
    pairs = zip(window.parts, seconds, strict=False)
    parts = tuple(replace(part, duration=one) for part, one in pairs if one is not None)
    joined = join_parts(parts, window.pause)
    return replace(joined, id=window.id) if len(parts) == len(window.parts) else joined


def part_offsets(window: Utterance) -> list[float]:
    """Start of each part of a window, in seconds."""
    lengths = [clip_seconds(part) + window.pause for part in window.parts]
    return [0.0, *accumulate(lengths[:-1])]


def clip_seconds(utterance: Utterance, unknown: float = 0.0) -> float:
    """Seconds, from the audio's header where the dataset has none; `unknown` where that fails."""
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


# --- decoding -----------------------------------------------------------------------------------


# A resampler or an MP3 decoder can make a clip of 30 s slightly longer; the excess is cut off.
SLACK_SAMPLES = SAMPLE_RATE // 100


@dataclass(frozen=True)
class DecodedClip:
    """An utterance and its samples: at most 30 s, not padded."""

    utterance: Utterance
    samples: Int16[np.ndarray, "n"]
    parts: tuple[float | None, ...] = ()
    """Of a packed window: seconds of each planned part; None for a part not in the clip."""

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class WindowBatch:
    """Clips padded to 30 s. The rows after the last utterance repeat it.

    They do not hold silence: a model may write more about silence than about any clip, and a batch
    is decoded until its last row ends.
    """

    utterances: list[Utterance]
    waveforms: Int16[np.ndarray, "B N"]


def decode_clip(utterance: Utterance, turn: int = 0) -> DecodedClip | Skipped:
    """The decoded clip, or why there is none: damaged, missing or longer than 30 s.

    turn: selects one of the clips of a packed window whose audio needs several.
    """
    clips = decode_clips(utterance)
    return clips if isinstance(clips, Skipped) else clips[turn % len(clips)]


def decode_clips(utterance: Utterance) -> list[DecodedClip] | Skipped:
    """The clips of an utterance, or why there are none: one, or several of a packed window.

    A window's parts get the durations of their samples, which may differ from the dataset's or the
    header's. If they exceed 30 s together, the rest becomes another clip. A part that cannot be
    decoded is left out with a warning.
    """
    if not utterance.parts:
        clip = _decode(utterance)
        return clip if isinstance(clip, Skipped) else [clip]
    pause = round(utterance.pause * SAMPLE_RATE)
    groups: list[dict[int, DecodedClip]] = []  # clips by the number of their part
    skipped, room = [], 0
    for number, clip in enumerate(map(_decode, utterance.parts)):
        if isinstance(clip, Skipped):
            skipped.append(clip)
            continue
        room -= pause + len(clip.samples)
        if not groups or room < 0:
            groups.append({})
            room = CLIP_SAMPLES + SLACK_SAMPLES - len(clip.samples)
        groups[-1][number] = clip
    if not groups:
        return Skipped(utterance.id, "; ".join(dict.fromkeys(one.reason for one in skipped)))
    for one in skipped:
        logger.warning("%s is left out of its window: %s", one.id, one.reason)
    return [_window(utterance, group) for group in groups]


def _window(window: Utterance, clips: dict[int, DecodedClip]) -> DecodedClip:
    """Some parts of a window in sequence, with their times in it."""
    pause = np.zeros(round(window.pause * SAMPLE_RATE), np.int16)
    pieces = [piece for clip in clips.values() for piece in (pause, clip.samples)]
    samples = np.concatenate(pieces[1:])[:CLIP_SAMPLES]
    numbers = range(len(window.parts))
    seconds = tuple(clips[one].duration if one in clips else None for one in numbers)
    return DecodedClip(with_durations(window, seconds), samples, seconds)


def _decode(utterance: Utterance) -> DecodedClip | Skipped:
    """One clip. Decoding stops where the clip is known to be too long."""
    longest = CLIP_SAMPLES // SAMPLE_RATE + 1
    try:
        samples = to_int16(load_waveform(utterance, longest))
    except (InputError, OSError) as error:
        return Skipped(utterance.id, str(error))
    if len(samples) > CLIP_SAMPLES + SLACK_SAMPLES:
        seconds = len(samples) / SAMPLE_RATE
        more = " or more" if seconds >= longest else ""
        return Skipped(utterance.id, f"too long: {seconds:.2f} s{more}, a window has 30 s")
    return DecodedClip(utterance, samples[:CLIP_SAMPLES])


def pad_samples(
    samples: Sequence[Int16[np.ndarray, "_"]], length: int = CLIP_SAMPLES
) -> Int16[np.ndarray, "B {length}"]:
    """Waveforms padded with silence to one length."""
    waveforms = np.zeros((len(samples), length), np.int16)
    for row, one in zip(waveforms, samples, strict=True):
        row[: len(one)] = one
    return waveforms


def pad_clips(clips: Sequence[DecodedClip], batch_size: int) -> WindowBatch:
    """One to `batch_size` clips as a batch of exactly that size."""
    rows = [clip.samples for clip in clips]
    rows += rows[-1:] * (batch_size - len(rows))
    return WindowBatch([clip.utterance for clip in clips], pad_samples(rows))


def window_batches(
    utterances: Iterable[Utterance],
    batch_size: int,
    workers: int = 4,
    skipped: Callable[[Skipped], None] | None = None,
) -> Iterator[WindowBatch]:
    """All utterances in order, in batches of one shape.

    skipped: called with each utterance that cannot be decoded; without it, the first one raises
        AudioError.
    """

    def decoded() -> Iterator[DecodedClip]:
        for clips in map_in_order(decode_clips, utterances, workers, ahead=2 * batch_size):
            if not isinstance(clips, Skipped):
                yield from clips
            elif skipped is None:
                raise AudioError(f"{clips.id}: {clips.reason}")
            else:
                skipped(clips)

    clips = decoded()
    while batch := list(islice(clips, batch_size)):
        yield pad_clips(batch, batch_size)
