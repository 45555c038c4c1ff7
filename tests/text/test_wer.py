import random

import jiwer
import pytest
from whisper.utils import compression_ratio as openai_compression_ratio

from flax_distil.errors import InputError
from flax_distil.text.languages import WITHOUT_SPACES
from flax_distil.text.wer import (
    ErrorCounts,
    compression_ratio,
    error_rate,
    word_errors,
)

CHARACTERS = error_rate(None, "cer")


def test_each_kind_of_error():
    counts = word_errors(["the cat sat on the mat"], ["the bat sat the mat now then"])
    assert counts == ErrorCounts(substitutions=1, deletions=1, insertions=2, reference_words=6)
    assert (counts.errors, counts.rate) == (4, 4 / 6)
    assert CHARACTERS.count(["abc d"], ["abd d"]) == ErrorCounts(1, 0, 0, 5)


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
    characters = CHARACTERS.count(references, hypotheses)
    assert characters.rate == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-12)


def test_empty_texts():
    assert word_errors([""], ["two words"]) == ErrorCounts(insertions=2)
    assert word_errors([""], ["two words"]).rate == 2.0
    assert word_errors(["two words"], [""]).rate == 1.0
    assert word_errors(["", "a"], ["", "a"]) == ErrorCounts(reference_words=1)
    assert word_errors([""], [""]).rate == word_errors([], []).rate == 0.0
    assert CHARACTERS.count([""], ["abc"]) == ErrorCounts(insertions=3)


def test_mismatched_lists_are_refused():
    with pytest.raises(InputError, match="2 references against 1 hypotheses"):
        word_errors(["a", "b"], ["a"])


@pytest.mark.parametrize("text", ["", "a", " Hello there.", " no no no" * 40, "日本語" * 9])
def test_compression_ratio_equals_openai(text):
    assert compression_ratio(text) == openai_compression_ratio(text)


def test_scripts_without_spaces_are_compared_by_characters_as_in_whispers_paper():
    """One wrong character of seven, whatever stands between them."""
    from whisper.normalizers import BasicTextNormalizer

    assert set(WITHOUT_SPACES) == {"zh", "ja", "th", "lo", "my", "yue", "km", "bo"}
    reference, hypothesis = "今天天气很好。", "今天 天汽很好啊"
    split = BasicTextNormalizer(split_letters=True)
    for language in WITHOUT_SPACES:
        rate = error_rate(language)
        assert rate.unit == "CER"
        counts = rate.count([reference], [hypothesis])
        assert counts == ErrorCounts(substitutions=1, insertions=1, reference_words=6)
        assert counts.rate == jiwer.wer(split(reference).strip(), split(hypothesis).strip())
    assert error_rate("zh", "wer").count([reference], [hypothesis]).reference_words == 1


def test_any_language_may_be_compared_by_characters():
    rate = error_rate("German", "cer")
    assert rate.unit == "CER"
    texts = ["Das ist gut!"], ["das  ißt gut"]
    normal = [[rate.normalize(text) for text in side] for side in texts]
    assert rate.count(*texts).rate == jiwer.cer(*normal) > 0
    assert error_rate("de").unit == error_rate(None).unit == "WER"
    with pytest.raises(InputError, match="tlh"):
        error_rate("tlh")


@pytest.mark.parametrize(("language", "asked"), [("en", "auto"), ("en", "cer"), ("zh", "auto")])
def test_parts_share_the_errors_of_the_whole(language, asked):
    """Wherever they fall: the parts' counts add up to those of the joined texts."""
    rate, pick = error_rate(language, asked), random.Random(2)
    letters = "天气很好今" if language == "zh" else ["go", "up", "the", "road", "we", "did"]
    text = lambda most: " ".join(pick.choices(letters, k=pick.randint(0, most)))
    for _ in range(50):
        parts, hypothesis = [text(6) for _ in range(4)], text(24)
        found = rate.count_parts(parts, hypothesis)
        whole = rate.count([" ".join(filter(None, parts))], [hypothesis])
        if any(parts):
            assert sum(errors for errors, _ in found) == whole.errors
        spaces = max(sum(map(bool, parts)) - 1, 0) if asked == "cer" else 0
        assert sum(words for _, words in found) == whole.reference_words - spaces


def test_errors_fall_in_the_part_that_they_are_of():
    parts = ["We went up the road.", "", "Nobody was there.", "It rained."]
    rate = error_rate("en")
    assert rate.count_parts(parts, "we went up the road nobody was there it rained") == [
        *[(0, 5), (0, 0), (0, 3), (0, 2)]
    ]
    made_up = "We went up the road. Thanks for watching, everybody! Nobody is there."
    assert rate.count_parts(parts, made_up) == [(4, 5), (0, 0), (1, 3), (2, 2)]
    assert rate.count_parts(parts, "so we went up the road nobody was there it rained")[0] == (1, 5)
    assert rate.count_parts(["", "(uh)"], "made up") == [(0, 0), (0, 0)]
