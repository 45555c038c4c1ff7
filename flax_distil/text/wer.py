"""Word and character error rates, and the compression ratio that detects repetition loops."""

import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

from flax_distil.errors import InputError
from flax_distil.text.languages import WITHOUT_SPACES, to_language_code
from flax_distil.text.normalize import normalizer


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn references into hypotheses; counts of several texts can be added."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_words: int = 0  # characters, where characters were counted

    @property
    def errors(self) -> int:
        """Edits of all three kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference word: 0.1 is 10 %. For an empty reference, the number of errors."""
        return self.errors / max(self.reference_words, 1)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ErrorRate:
    """The error rate of transcripts in one language."""

    unit: Literal["WER", "CER"]
    """Unit: words or characters."""
    normalize: Callable[[str], str]
    process: Callable[..., Any]
    """jiwer's function that compares normalised texts."""
    spaces: bool = False
    """Whether spaces are counted."""

    def count(self, references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
        """Error counts of texts, which are normalised here."""
        normalised = (list(map(self.normalize, texts)) for texts in (references, hypotheses))
        return _count(self.process, *normalised)

    def count_parts(self, parts: Sequence[str], hypothesis: str) -> list[tuple[int, int]]:
        """(errors, reference units) of each part of a text, from the alignment of the whole text.

        An insertion between two parts counts for the part before it, else the first with text.
        """
        texts = [self.normalize(part) for part in parts]
        sizes = [len(text if self.spaces else text.split()) for text in texts]
        errors = [0] * len(parts)
        spoken = [number for number, text in enumerate(texts) if text]
        if not spoken:
            return list(zip(errors, sizes, strict=True))
        ends = list(accumulate(sizes[number] + self.spaces for number in spoken))
        joined = " ".join(texts[number] for number in spoken)
        for chunk in self.process([joined], [self.normalize(hypothesis)]).alignments[0]:
            if chunk.type == "insert":
                place = bisect_right(ends, max(chunk.ref_start_idx - 1, 0))
                errors[spoken[place]] += chunk.hyp_end_idx - chunk.hyp_start_idx
            elif chunk.type != "equal":
                for unit in range(chunk.ref_start_idx, chunk.ref_end_idx):
                    errors[spoken[bisect_right(ends, unit)]] += 1
        return list(zip(errors, sizes, strict=True))


@cache
def error_rate(language: str | None, metric: Literal["auto", "wer", "cer"] = "auto") -> ErrorRate:
    """The error rate of a language: "auto" is CER where no spaces separate words, else WER.

    For those languages spaces are not counted as characters, as in the Whisper paper; for others
    they are, as in jiwer.

    Raises:
        InputError: an unknown language.
    """
    from jiwer import process_characters, process_words

    code = None if language is None else to_language_code(language)
    if metric == "wer" or (metric == "auto" and code not in WITHOUT_SPACES):
        return ErrorRate("WER", normalizer(code, split_letters=False), process_words)
    if code in WITHOUT_SPACES:
        return ErrorRate("CER", normalizer(code), process_words)
    return ErrorRate("CER", normalizer(code), process_characters, spaces=True)


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
    """jiwer's counts over all pairs of texts, which are not normalised here.

    With an empty reference, each word of the hypothesis is an insertion.

    Raises:
        InputError: the two lists differ in length.
    """
    from jiwer import process_words

    return _count(process_words, references, hypotheses)


def _count(process, references: Sequence[str], hypotheses: Sequence[str]) -> ErrorCounts:
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
    """UTF-8 bytes divided by their zlib size; above 2.4 Whisper assumes a repetition loop."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
