"""Words of several texts under those of their reference."""

import jiwer
import pytest

from flax_distil.evaluate.differences import MOST_INSERTED, align_words, written_words
from flax_distil.text.normalize import normalizer


def lines(reference: str, texts: list[str], language: str = "en") -> list[list[str]]:
    """The rows of the columns, with a sign for the kind of each word that differs."""
    signs = {"equal": "", "substitute": "~", "delete": "-", "insert": "+"}
    columns = align_words(reference, texts, language)
    rows = [[column.reference for column in columns]]
    for number in range(len(texts)):
        words = [column.words[number] for column in columns]
        rows.append(["" if one is None else signs[one.kind] + one.text for one in words])
    return rows


def test_all_texts_stand_under_the_reference():
    assert lines("The big dog sat.", ["the pig dog sat down", "A the BIG sat, sat."]) == [
        ["", "The", "big", "dog", "sat.", ""],
        ["", "the", "~pig", "dog", "sat", "+down"],
        ["+A", "the", "BIG", "~sat,", "sat.", ""],
    ]


def test_empty_texts():
    assert lines("", ["thank you", ""]) == [["", ""], ["+thank", "+you"], ["", ""]]
    assert lines("Hello there", [""]) == [["Hello", "there"], ["-Hello", "-there"]]


def test_languages_without_spaces_are_aligned_by_letters():
    assert lines("今天好气", ["今好汽"], "zh") == [
        ["今", "天", "好", "气"],
        ["今", "-天", "好", "~汽"],
    ]


def test_words_stay_as_they_were_written_where_the_normaliser_keeps_them_apart():
    assert written_words("Um, It's Mr. Smith's COLOUR, twenty dollars!", "en") == [
        *("it", "is", "Mr.", "smith", "is", "COLOUR,", "$20")
    ]


def test_a_long_repetition_is_shortened():
    *_, last = align_words("go", ["go" + " on" * 200], "en")
    assert last.words[0] is not None
    assert last.words[0].text == f"… {200 - MOST_INSERTED} more words"


@pytest.mark.parametrize(
    "text",
    ["the cat sat on a mat", "cat the sat sat on mat mat", "dogs", "Twenty-one cats sit on it."],
)
def test_edits_are_those_that_the_error_rate_counts(text):
    reference = "The cat sat on the mat."
    columns = align_words(reference, [text], "en")
    kinds = [column.words[0].kind for column in columns if column.words[0] is not None]
    counts = jiwer.process_words(*map(normalizer("en"), (reference, text)))
    for kind, count in (
        ("substitute", counts.substitutions),
        ("delete", counts.deletions),
        ("insert", counts.insertions),
    ):
        assert kinds.count(kind) == count
