import random

import jiwer
import pytest
from whisper.utils import compression_ratio as openai_compression_ratio

from flax_distil.errors import InputError
from flax_distil.text.wer import ErrorCounts, character_errors, compression_ratio, word_errors


def test_each_kind_of_error():
    counts = word_errors(["the cat sat on the mat"], ["the bat sat the mat now then"])
    assert counts == ErrorCounts(substitutions=1, deletions=1, insertions=2, reference_words=6)
    assert (counts.hits, counts.errors, counts.rate) == (4, 4, 4 / 6)
    assert character_errors(["abc d"], ["abd d"]) == ErrorCounts(1, 0, 0, 5)


def corpus():
    pick = random.Random(1)
    words = ["a", "b", "c", "d", "ee", "ff"]
    text = lambda least: " ".join(pick.choices(words, k=pick.randint(least, 8)))
    return [text(1) for _ in range(60)], [text(0) for _ in range(60)]


def test_corpus_rates_equal_jiwer_and_counts_add_up():
    references, hypotheses = corpus()
    together = word_errors(references, hypotheses)
    assert together.rate == pytest.approx(jiwer.wer(references, hypotheses), rel=1e-12)
    pairs = zip(references, hypotheses, strict=True)
    assert sum((word_errors([r], [h]) for r, h in pairs), ErrorCounts()) == together
    characters = character_errors(references, hypotheses)
    assert characters.rate == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-12)


def test_empty_texts():
    assert word_errors([""], ["two words"]) == ErrorCounts(insertions=2)
    assert word_errors([""], ["two words"]).rate == 2.0
    assert word_errors(["two words"], [""]).rate == 1.0
    assert word_errors(["", "a"], ["", "a"]) == ErrorCounts(reference_words=1)
    assert word_errors([""], [""]).rate == word_errors([], []).rate == 0.0
    assert character_errors([""], ["abc"]) == ErrorCounts(insertions=3)


def test_mismatched_lists_are_refused():
    with pytest.raises(InputError, match="2 references against 1 hypotheses"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(TypeError, match="lists of texts"):
        word_errors("ab", "ab")


@pytest.mark.parametrize("text", ["", "a", " Hello there.", " no no no" * 40, "日本語" * 9])
def test_compression_ratio_equals_openai(text):
    assert compression_ratio(text) == openai_compression_ratio(text)
