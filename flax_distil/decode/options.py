"""What one asks of the decoder, and what comes back."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from flax_distil.errors import InputError


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
    beams: int = 1
    """Texts followed at once by beam search; 1 is greedy search."""
    beam_search: Literal["whisper", "transformers"] = "whisper"
    """Whose beam search: they differ in when a text counts as found and when it stops."""
    patience: float = 1.0
    """Whisper's beam search stops when beams x patience texts have ended (arXiv 2204.05424)."""
    length_penalty: float | None = None
    """Exponent of the length that scores are divided by. Whisper: 0 to 1, of ((5 + length) / 6);
    without it, the mean. Transformers: any; without it, 1."""
    temperature: float = 0.0
    """Above 0 tokens are drawn, and beams are not used."""
    best_of: int = 1
    """Texts drawn where the temperature is above 0; the best one is returned."""
    seed: int = 0
    """Of all that is drawn."""
    prompt: str | None = None
    """Text that went before: names and style are taken from it. Its last 223 tokens count."""
    hotwords: str | None = None
    """Words to expect, put in front of all other text that went before, in every window."""
    prefix: str | None = None
    """How the text begins: of the first window, and of every chunk. The result begins so too."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were written in this window before less probable."""
    no_repeat_ngram: int = 0
    """No run of so many tokens is written twice in a window; 0 allows it."""

    def __post_init__(self):
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("max_initial_timestamp", self.max_initial_timestamp, 0),
            ("beams", self.beams, 1),
            ("temperature", self.temperature, 0),
            ("best_of", self.best_of, 1),
            ("no_repeat_ngram", self.no_repeat_ngram, 0),
        ):
            if not value >= least:
                raise InputError(f"{name} is {value}: it must be at least {least}")
        for name, value in (
            ("patience", self.patience),
            ("repetition_penalty", self.repetition_penalty),
        ):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value}: it must be a number above 0")
        if self.beam_search == "whisper" and not 0 <= (self.length_penalty or 0) <= 1:
            raise InputError(
                f"length_penalty is {self.length_penalty}: Whisper's beam search takes 0 to 1, "
                'beam_search="transformers" any'
            )
        if round(self.beams * self.patience) < 1:
            raise InputError(
                f"{self.beams} beams with patience {self.patience} stop before the first text has "
                f"ended: use a patience of at least {1 / self.beams:.2g}"
            )


class Acceptance(NamedTuple):
    """How good an assistant's guesses were: integers, one a row (arrays) or one for all.

    passes: of the teacher, the prompt's included.
    alone: those of them that had no guesses to verify.
    drafted, accepted: guesses that the teacher read, and those that it kept.
    written: tokens, the end included.
    """

    passes: Any
    alone: Any
    drafted: Any
    accepted: Any
    written: Any

    @property
    def rate(self) -> float:
        """Part of the guesses that were kept, over all rows."""
        return float(np.sum(self.accepted) / max(np.sum(self.drafted), 1))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass of the teacher yields, over all rows; 1 without an assistant."""
        return float(np.sum(self.written) / max(np.sum(self.passes), 1))


@dataclass(frozen=True)
class Hypothesis:
    """What the model wrote for one window.

    mean_log_probability: of the tokens and the end of text, Whisper's `avg_logprob`, from the
        distribution after suppression (before it in Transformers' beam search).
    no_speech_probability: of the no-speech token at the start of transcript.
    temperature: at which it was written.
    acceptance: of an assistant's guesses, where one helped.
    ended: whether the model ended the text; False where it was cut at `max_tokens`.
    """

    tokens: tuple[int, ...]
    text: str
    language: str
    mean_log_probability: float
    no_speech_probability: float
    compression_ratio: float
    temperature: float = 0.0
    acceptance: Acceptance | None = None
    ended: bool = True


def total(acceptances: Iterable[Acceptance | None]) -> Acceptance | None:
    """The sums over all of them; None where no assistant was used."""
    known = [one for one in acceptances if one is not None]
    return (
        Acceptance(*(int(np.sum(column)) for column in zip(*known, strict=True))) if known else None
    )
