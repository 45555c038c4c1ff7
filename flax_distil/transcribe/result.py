"""What a transcription is: openai-whisper's result and names, so that its tools can read it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A stretch of speech. Times are seconds from the start of the audio."""

    id: int
    seek: int
    """Where the window began that it was heard in, in frames of 10 ms."""
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    """Mean log-probability of the window's tokens."""
    compression_ratio: float
    no_speech_prob: float


@dataclass(frozen=True)
class Transcript:
    """The whole text, its segments, and the code of the language."""

    text: str
    segments: tuple[Segment, ...]
    language: str
