"""Short utterances concatenated to windows: clips of 7 s leave three quarters of a window silent.

Every encoder pass costs 30 s, whatever the window holds. So consecutive utterances of one speaker
and language share one, as in the later published recipes (distil-large-v3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioError, audio_duration
from flax_distil.data.utterances import Utterance, Utterances
from flax_distil.errors import InputError


@dataclass(frozen=True)
class Packed(Sequence[Utterance]):
    """Windows over a dataset: `groups` are the rows of each, spoken `pause` seconds apart."""

    utterances: Utterances
    groups: Sequence[tuple[int, ...]]
    pause: float

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        parts = tuple(self.utterances[row] for row in self.groups[index])
        return join(parts, self.pause)

    def since(self, start: int) -> Iterator[Utterance]:
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
    for row, utterance in enumerate(utterances.since(0)):
        key = (utterance.speaker, utterance.recording, utterance.language)
        duration = min(length(utterance, unknown=seconds), seconds)
        group, filled = open_groups.get(key, ([], 0.0))
        if not group or filled + pause + duration > seconds + 1e-6:
            group, filled = [], -pause
            groups.append(group)
        group.append(row)
        open_groups[key] = (group, filled + pause + duration)
    return Packed(utterances, [tuple(group) for group in groups], pause)


def join(parts: tuple[Utterance, ...], pause: float) -> Utterance:
    """One utterance of several, with all their words."""
    first, *rest = parts
    if not rest:
        return first
    texts = [part.text for part in parts]
    return Utterance(
        id=f"{first.id}+{len(rest)}",
        audio=b"",
        text=None if None in texts else " ".join(filter(None, texts)),
        duration=sum(length(part) for part in parts) + pause * len(rest),
        speaker=first.speaker,
        language=first.language,
        ended=parts[-1].ended,
        speech=any(part.speech for part in parts),
        parts=parts,
        pause=pause,
        recording=first.recording,
    )


def beginnings(window: Utterance) -> list[float]:
    """Second at which each part of a window begins."""
    lengths = [length(part) + window.pause for part in window.parts]
    return [0.0, *accumulate(lengths[:-1])]


def length(utterance: Utterance, unknown: float = 0.0) -> float:
    """Seconds, read from the audio's header where the dataset does not tell.

    A clip that cannot be read counts as `unknown`; whoever hears it will say why.
    """
    if utterance.duration is not None:
        return utterance.duration
    try:
        return audio_duration(utterance.audio) or unknown  # type: ignore[arg-type]
    except AudioError:
        return unknown
