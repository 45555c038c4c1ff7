"""The result of a transcription, with openai-whisper's names, so that its tools can read it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from flax_distil.decode.hypothesis import Acceptance


@dataclass(frozen=True)
class Word:
    """A word with the space before it, and its seconds from the start of the audio."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech. Times are seconds from the start of the audio."""

    id: int
    seek: int
    """First frame of its window, in frames of 10 ms."""
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    """Mean log-probability of the window's tokens."""
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None
    """Only where word timestamps were asked for."""


@dataclass(frozen=True)
class Transcript:
    """The whole text, its segments, and the code of the language."""

    text: str
    segments: tuple[Segment, ...]
    language: str
    acceptance: Acceptance | None = None
    """Of the assistant's draft tokens, where one was used."""

    def as_dict(self) -> dict[str, Any]:
        """The dictionary that openai-whisper's `transcribe` returns."""
        result = asdict(replace(self, acceptance=None))
        del result["acceptance"]
        for segment in result["segments"]:
            if segment["words"] is None:
                del segment["words"]
        return result
