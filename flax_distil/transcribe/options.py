"""How long audio is read: Whisper's thresholds, or how it is cut into chunks."""

import math
from dataclasses import dataclass
from itertools import pairwise

from flax_distil.errors import InputError
from flax_distil.model.dims import CHUNK_SECONDS


@dataclass(frozen=True)
class SequentialOptions:
    """Whisper's thresholds; the defaults are its own."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried in turn until a text looks right; the last one's text is taken as it is."""
    compression_ratio_threshold: float | None = 2.4
    """A text that compresses further repeats itself."""
    logprob_threshold: float | None = -1.0
    """The model doubts a text whose tokens have a lower mean log-probability."""
    no_speech_threshold: float | None = 0.6
    """A window whose no-speech token is more probable is silent, if the model doubts its text."""
    condition_on_previous_text: bool = True
    """Tell each window what was said before it, if the model was trained so."""
    carry_prompt: bool = False
    """Tell every window the prompt, not only the first."""
    clips: tuple[float, ...] = ()
    """Start, end, start, … of the parts to transcribe, in seconds; without it, all."""
    word_timestamps: bool = False
    """Say when each word is spoken; the next window then begins behind the last word."""
    hallucination_silence_threshold: float | None = None
    """With words: text that looks unlike speech is dropped between pauses of so many seconds."""

    def __post_init__(self):
        if self.hallucination_silence_threshold is not None and not self.word_timestamps:
            raise InputError(
                "hallucination_silence_threshold judges text by the times of its words: ask for "
                "word_timestamps too"
            )
        if not self.temperatures or min(self.temperatures) < 0:
            raise InputError(f"temperatures are {self.temperatures}: give some, none below 0")
        times = (0.0, *self.clips)
        if not all(one <= following < math.inf for one, following in pairwise(times)):
            raise InputError(
                f"clips are {self.clips}: give start, end, start, … in seconds, none before another"
            )


@dataclass(frozen=True)
class ChunkedOptions:
    """How the audio is cut."""

    chunk_length: float = 30.0
    """Seconds of a chunk; for distilled models 15 to 25 is better (paper table 20)."""
    stride: float | None = None
    """Seconds that a chunk shares with the next one, on each side; a sixth of it otherwise."""

    @property
    def overlap(self) -> float:
        """The stride, or its default."""
        return self.chunk_length / 6 if self.stride is None else self.stride

    def __post_init__(self):
        if not 0 < self.chunk_length <= CHUNK_SECONDS:
            raise InputError(
                f"chunk_length is {self.chunk_length} s: Whisper hears more than 0 and at most "
                f"{CHUNK_SECONDS} s at a time"
            )
        if not 0 <= 2 * self.overlap <= self.chunk_length - 0.01:  # of which a frame is left
            raise InputError(
                f"a stride of {self.overlap} s on both sides leaves nothing of a chunk of "
                f"{self.chunk_length} s: use less than {self.chunk_length / 2:g} s"
            )
