"""What one asks of the decoder, and what comes back."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode a window of at most 30 seconds."""

    language: str | None = None
    """Spoken language ("en"); without it a multilingual model detects that of each clip."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Write what is said, or its English translation (multilingual models)."""
    timestamps: bool = False
    """Let the model write timestamp tokens (Whisper's timestamp rules apply)."""
    max_tokens: int = 224
    """At most this many tokens a window: half of the context, as in Whisper."""
    max_initial_timestamp: float = 1.0
    """With timestamps: the first one lies at most this many seconds into the window."""


@dataclass(frozen=True)
class Hypothesis:
    """What the model wrote for one window.

    mean_log_probability: of the tokens and the end of text, Whisper's `avg_logprob`, from the
        distribution after suppression.
    no_speech_probability: of the no-speech token at the start of transcript.
    """

    tokens: tuple[int, ...]
    text: str
    language: str
    mean_log_probability: float
    no_speech_probability: float
    compression_ratio: float
