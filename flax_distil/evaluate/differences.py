"""The words of several texts aligned with those of their reference, column by column."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from flax_distil.text.wer import error_rate

MOST_INSERTED = 30  # words in one place; of more, their number is shown


class AlignedWord(NamedTuple):
    """A word of a text, or the reference's word that the text lacks."""

    text: str
    kind: str
    """jiwer's: equal, substitute, delete or insert."""


class WordColumn(NamedTuple):
    """A word of the reference, "" before which others insert one, and each text's word."""

    reference: str
    words: tuple[AlignedWord | None, ...]


def align_words(reference: str, texts: Sequence[str], language: str) -> list[WordColumn]:
    """Columns of words, by jiwer's alignment of each normalised text with the reference.

    Words are shown as they were written, where the normaliser keeps them apart.
    """
    from jiwer import process_words

    normalize = error_rate(language).normalize
    wanted, shown = normalize(reference).split(), written_words(reference, language)
    # Of each text: the word at each word of the reference, and those inserted before it.
    at: list[list[AlignedWord]] = []
    before: list[list[list[AlignedWord]]] = []
    for text in texts:
        given, words = normalize(text).split(), written_words(text, language)
        at.append([AlignedWord(word, "delete") for word in shown])
        before.append([[] for _ in range(len(wanted) + 1)])
        if not wanted or not given:
            before[-1][0] = [AlignedWord(word, "insert") for word in words]
            continue
        for chunk in process_words([" ".join(wanted)], [" ".join(given)]).alignments[0]:
            some = words[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "insert":
                before[-1][chunk.ref_start_idx] += [AlignedWord(word, "insert") for word in some]
            elif chunk.type != "delete":
                places = range(chunk.ref_start_idx, chunk.ref_end_idx)
                for place, word in zip(places, some, strict=True):
                    at[-1][place] = AlignedWord(word, chunk.type)
    columns = []
    for place in range(len(wanted) + 1):
        inserted = [shortened(some[place]) for some in before]
        for row in range(max(map(len, inserted))):
            words = (some[row] if row < len(some) else None for some in inserted)
            columns.append(WordColumn("", tuple(words)))
        if place < len(wanted):
            columns.append(WordColumn(shown[place], tuple(some[place] for some in at)))
    return columns


def shortened(words: list[AlignedWord]) -> list[AlignedWord]:
    """The words; of a long repetition the beginning, and how many follow."""
    if len(words) <= MOST_INSERTED:
        return words
    rest = f"… {len(words) - MOST_INSERTED} more words"
    return [*words[:MOST_INSERTED], AlignedWord(rest, "insert")]


def written_words(text: str, language: str) -> list[str]:
    """The words of the normalised text, as they were written where one was one word before."""
    normalize = error_rate(language).normalize
    words = normalize(text).split()
    pieces = [(written, normalize(written).split()) for written in text.split()]
    alone = [(written, parts[0]) for written, parts in pieces if len(parts) == 1]
    matcher = SequenceMatcher(None, [word for _, word in alone], words, autojunk=False)
    for start, place, size in matcher.get_matching_blocks():
        words[place : place + size] = [written for written, _ in alone[start : start + size]]
    return words
