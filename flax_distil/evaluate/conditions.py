"""What clips are decoded under: added noise, or text before them; and sounds without speech.

Everything that is drawn depends on the seed and the clip's name alone, so that every model gets the
same sound, in every run and on any number of hosts.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.noise import mean_power, mix_at_snr, noise_excerpt, white_noise
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.errors import InputError
from flax_distil.evaluate.results import Test

log = logging.getLogger(__name__)

BABBLE_VOICES = 6
BANK_CLIPS = 40  # clips of a dataset from which babble and previous texts are made
Sound = Float32[np.ndarray, "_"]


class ReferenceClip(NamedTuple):
    """A clip to decode, with its reference.

    previous: text before it, given as a prompt.
    """

    id: str
    waveform: Sound
    reference: str
    language: str
    speaker: str | None = None
    previous: str = ""

    @property
    def seconds(self) -> float:
        """Of audio."""
        return self.waveform.size / SAMPLE_RATE


class Change(Protocol):
    """What a condition does to a clip. bank: other clips of its dataset. draw: the clip's own."""

    def __call__(
        self, clip: ReferenceClip, bank: Sequence[ReferenceClip], draw: np.random.Generator
    ) -> ReferenceClip: ...


class Condition(NamedTuple):
    """One setting of a test on clips of at most 30 s; no change decodes them as they are."""

    test: Test
    setting: str = ""
    change: Change | None = None

    def apply(
        self, clips: Iterable[ReferenceClip], bank: Sequence[ReferenceClip], dataset: str, seed: int
    ) -> Iterator[ReferenceClip]:
        """The clips under this condition."""
        for clip in clips:
            name = zlib.crc32(f"{dataset}/{clip.id}".encode(errors="surrogateescape"))
            draw = np.random.default_rng((seed, name))
            yield self.change(clip, bank, draw) if self.change else clip


@dataclass(frozen=True)
class AddedNoise:
    """Noise at a signal-to-noise ratio, relative to each clip's own power (paper section 5.3).

    kind: white, babble of other clips of the dataset, or recordings.
    """

    snr_db: float
    kind: str
    recordings: tuple[Sound, ...] = ()

    def __call__(
        self, clip: ReferenceClip, bank: Sequence[ReferenceClip], draw: np.random.Generator
    ) -> ReferenceClip:
        if not clip.waveform.any():
            return clip
        noise = np.zeros(clip.waveform.size, np.float32)
        while not noise.any():  # a stretch of a recording may be silent
            noise = np.asarray(self.sound(clip, bank, draw), np.float32)
        return clip._replace(waveform=mix_at_snr(clip.waveform, noise, self.snr_db))

    def sound(
        self, clip: ReferenceClip, bank: Sequence[ReferenceClip], draw: np.random.Generator
    ) -> np.ndarray:
        """Noise as long as the clip."""
        length = clip.waveform.size
        if self.kind == "white":
            return draw.standard_normal(length, np.float32)
        if self.kind == "recorded":
            recording = self.recordings[draw.integers(len(self.recordings))]
            return noise_excerpt(draw, recording, length)
        voices = [one.waveform for one in bank if one.id != clip.id and one.waveform.any()]
        if not voices:
            raise InputError(
                "babble is made of a dataset's other clips, and it has none: use white noise"
            )
        chosen = [voices[one] for one in draw.permutation(len(voices))[:BABBLE_VOICES]]
        excerpts = (noise_excerpt(draw, one, length) / np.sqrt(mean_power(one)) for one in chosen)
        return np.sum(list(excerpts), axis=0)


@dataclass(frozen=True)
class PreviousText:
    """Other references of the dataset before the clip, cut to about `tokens` tokens.

    A word of English has 1.3 tokens; all models get the same text.
    """

    tokens: int

    def __call__(
        self, clip: ReferenceClip, bank: Sequence[ReferenceClip], draw: np.random.Generator
    ) -> ReferenceClip:
        texts = [one.reference for one in bank if one.id != clip.id] or [clip.reference]
        count, words = round(self.tokens / 1.3), list[str]()
        start = int(draw.integers(len(texts)))
        while len(words) < count:
            words += texts[start % len(texts)].split() or ["."]
            start += 1
        return clip._replace(previous=" ".join(words[-count:]))


def noise_conditions(
    snrs_db: Sequence[float], kinds: Sequence[str], recordings: str | None
) -> list[Condition]:
    """A condition for each kind of noise and ratio. recordings: a dataset of noise, of any length.

    Recordings that are damaged or silent are left out, with a warning.

    Raises:
        InputError: the recordings cannot be read, none can be used, or there is no ratio for them.
    """
    if recordings and not snrs_db:
        raise InputError(
            f"noise_recordings is {recordings}, without a ratio to mix it at: add noise"
        )
    sounds: list[Sound] = []
    for one in read_dataset(recordings).iter_from(0) if recordings else ():
        try:
            sound = load_waveform(one)
            if not sound.any():
                raise InputError("it is silent")
            sounds.append(sound)
        except (InputError, OSError) as error:
            log.warning("noise: %s is left out: %s", one.id, error)
    if recordings:
        if not sounds:
            raise InputError(
                f"{recordings} has no recording of noise that is not damaged or silent"
            )
        kinds = (*kinds, "recorded")
    return [
        Condition("noise", f"{kind}, {snr:g} dB", AddedNoise(snr, kind, tuple(sounds)))
        for kind in kinds
        for snr in snrs_db
    ]


def non_speech_clips(count: int, seed: int = 0) -> Iterator[ReferenceClip]:
    """Clips of 2 to 30 s without speech, in turn digital silence, white noise, brown noise, hum of
    the mains and music (chords of a few decaying partials), at -60 to -20 dB of full scale."""
    kinds = ("silence", "white noise", "brown noise", "hum", "music")
    for number in range(count):
        kind, draw = kinds[number % len(kinds)], np.random.default_rng((seed, number))
        length = round(draw.uniform(2, 30) * SAMPLE_RATE)
        time = np.arange(length) / SAMPLE_RATE
        if kind == "silence":
            sound = np.zeros(length)
        elif kind == "hum":
            sound = sum(np.sin(2 * np.pi * 50 * n * time) / n**2 for n in range(1, 8))
        elif kind == "music":
            sound = music(time, draw)
        else:
            sound = white_noise((seed, number), length)
            sound = np.cumsum(sound - sound.mean()) if kind == "brown noise" else sound
        sound = np.asarray(sound, np.float64)
        level = 10 ** (draw.uniform(-60, -20) / 20)
        scaled = level * sound / max(np.sqrt(mean_power(sound)), 1e-9)
        yield ReferenceClip(f"{number:03d} {kind}", scaled.astype(np.float32), "", "en")


def music(time: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Major and minor triads, two a second, of tones with six decaying partials."""
    sound, beat = np.zeros_like(time), 0.5
    for start in np.arange(0, time[-1], beat):
        root, third = 110 * 2 ** (draw.integers(24) / 12), draw.choice([3, 4])
        here = (time >= start) & (time < start + 2 * beat)
        since = time[here] - start
        for step in (0, third, 7):
            pitch = root * 2 ** (step / 12)
            for partial in range(1, 7):
                tone = np.sin(2 * np.pi * pitch * partial * since) / partial
                sound[here] += tone * np.exp(-3 * partial * since) * np.minimum(since / 0.01, 1)
    return sound


def joined(
    clips: Iterable[ReferenceClip], seconds: float, pause: float = 0.5
) -> Iterator[ReferenceClip]:
    """Recordings of about `seconds`, made of consecutive clips of one language with pauses."""
    silence = np.zeros(round(pause * SAMPLE_RATE), np.float32)
    waiting: dict[str, list[ReferenceClip]] = {}

    def recording(parts: Sequence[ReferenceClip]) -> ReferenceClip:
        sounds = [sound for part in parts for sound in (part.waveform, silence)]
        return ReferenceClip(
            f"{parts[0].id} … {parts[-1].id}",
            np.concatenate(sounds[:-1]),
            " ".join(part.reference for part in parts),
            parts[0].language,
        )

    for clip in clips:
        parts = waiting.setdefault(clip.language, [])
        parts.append(clip)
        if sum(part.seconds + pause for part in parts) >= seconds:
            yield recording(waiting.pop(clip.language))
    yield from map(recording, waiting.values())
