"""Clips decoded ahead of time, in order, and padded to 30 s, for labelling and evaluation."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Int16

from flax_distil.audio import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.audio.load import AudioError, to_int16
from flax_distil.data.packing import with_durations
from flax_distil.data.utterances import Skipped, Utterance, load_waveform
from flax_distil.data.workers import map_in_order
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

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
