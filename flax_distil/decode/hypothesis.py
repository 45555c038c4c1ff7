"""One window: what decoding starts from, what it returns, and how draft tokens fared."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Window:
    """What a window is decoded with, beside its sound and the options of the search.

    language: code; None until it is detected.
    previous: tokens of the text before it.
    temperature: above 0 tokens are drawn.
    seed: of what is drawn.
    """

    language: str | None = None
    previous: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0


class Acceptance(NamedTuple):
    """What became of an assistant's draft tokens: integers, one a row (arrays) or one for all.

    passes: of the model, the prompt's included.
    drafted, accepted: draft tokens that the model verified, and those that it accepted.
    written: tokens of the text, the end of text included.
    """

    passes: Any
    drafted: Any
    accepted: Any
    written: Any

    @property
    def rate(self) -> float:
        """Part of the draft tokens that were accepted, over all rows."""
        return float(np.sum(self.accepted) / max(np.sum(self.drafted), 1))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass of the model yields, over all rows; 1 without an assistant."""
        return float(np.sum(self.written) / max(np.sum(self.passes), 1))

    @classmethod
    def total(cls, parts: Iterable["Acceptance | None"]) -> "Acceptance | None":
        """The sums over all parts; None where no assistant was used."""
        known = [part for part in parts if part is not None]
        return cls(*(int(np.sum(column)) for column in zip(*known, strict=True))) if known else None


@dataclass(frozen=True)
class Hypothesis:
    """The text of one window.

    mean_log_probability: of the tokens and the end of text, Whisper's `avg_logprob`, from the
        distribution after suppression.
    no_speech_probability: of the no-speech token at the start of transcript.
    temperature: at which it was decoded.
    acceptance: of an assistant's draft tokens, where one was used.
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
