"""Word and character error counts, and the compression ratio that gives away loops."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from flax_distil.errors import InputError


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn references into hypotheses; sums of counts are counts of the whole."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_words: int = 0  # characters, where characters were counted

    @property
    def errors(self) -> int:
        """Edits of all three kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def hits(self) -> int:
        """Reference words that the hypothesis has."""
        return self.reference_words - self.substitutions - self.deletions

    @property
    def rate(self) -> float:
        """Errors a reference word: 0.1 is 10 %. Over an empty reference, the number of errors."""
        return self.errors / max(self.reference_words, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_words + other.reference_words,
        )


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """Counts over all pairs, as jiwer counts; texts are compared as they are, normalise before.

    An empty reference turns each hypothesis word into an insertion.
    Raises InputError when the two lists differ in length.
    """
    from jiwer import process_words

    return _count(process_words, references, hypotheses)


def character_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """The same in characters, spaces included: for scripts that do not part words."""
    from jiwer import process_characters

    return _count(process_characters, references, hypotheses)


def _count(process, references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise TypeError("references and hypotheses are lists of texts, not one text")
    if len(references) != len(hypotheses):
        raise InputError(
            f"{len(references)} references against {len(hypotheses)} hypotheses: give one of each "
            "for every clip"
        )
    if not references:
        return ErrorCounts()
    counts = process(list(references), list(hypotheses))
    return ErrorCounts(
        counts.substitutions,
        counts.deletions,
        counts.insertions,
        counts.hits + counts.substitutions + counts.deletions,
    )


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over their zlib size; Whisper takes a text above 2.4 for a loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
