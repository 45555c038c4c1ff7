"""Against openai-whisper's normalisers, Transformers' copy, and OpenAI's published cases."""

import json
import random
from importlib.resources import files

import pytest
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from flax_distil.errors import InputError
from flax_distil.text.normalize import normalizer

# The cases of openai-whisper's own tests.
PUBLISHED = {
    "two": "2",
    "thirty one": "31",
    "five twenty four": "524",
    "nineteen ninety nine": "1999",
    "twenty nineteen": "2019",
    "two point five million": "2500000",
    "four point two billions": "4200000000s",
    "200 thousand": "200000",
    "200 thousand dollars": "$200000",
    "$20 million": "$20000000",
    "€52.4 million": "€52400000",
    "£77 thousands": "£77000s",
    "two double o eight": "2008",
    "three thousand twenty nine": "3029",
    "forty three thousand two hundred sixty": "43260",
    "nineteen seventies": "1970s",
    "thirties": "30s",
    "thirty first": "31st",
    "thirty three thousand and three hundred and thirty third": "33333rd",
    "three billion": "3000000000",
    "millions": "1000000s",
    "july third twenty twenty": "july 3rd 2020",
    "august twenty sixth twenty twenty one": "august 26th 2021",
    "3 14": "3 14",
    "3.14": "3.14",
    "3 point 2": "3.2",
    "fourteen": "14",
    "two zero two zero": "2020",
    "nineteen hundred forty six": "1946",
    "minus 500": "-500",
    "positive twenty thousand": "+20000",
    "two dollars and seventy cents": "$2.70",
    "3 cents": "¢3",
    "$0.36": "¢36",
    "three euros and sixty five cents": "€3.65",
    "three and a half million": "3500000",
    "forty eight and a half dollars": "$48.5",
    "b747": "b 747",
    "10 th": "10th",
    "10th": "10th",
    "Let's": "let us",
    "he's like": "he is like",
    "she's been like": "she has been like",
    "10km": "10 km",
    "10mm": "10 mm",
    "RC232": "rc 232",
    "Mr. Park visited Assoc. Prof. Kim Jr.": "mister park visited associate professor kim junior",
    "mobilisation cancelation": "mobilization cancellation",
}

OTHERS = [
    "I kinda sorta dunno, cause it's 'cause of Dr. No!",
    "gonna gotta wanna ma'am we've y'all won't can't ain't I'd've",
    "Uh, hmm, [laughs] (coughs) <unk> the naïve Œuvre — £5, 50%, 1,234.5 …",
    "Colour, favourite, theatre; programme analysed at the centre",
    "",
    "...",
]


@pytest.mark.parametrize(("text", "expected"), PUBLISHED.items())
def test_published_cases(text, expected):
    assert normalizer("en")(text) == expected


LOOSE_WORDS = "$20 €3.50 1,000 3.14 % 50% and a 'cause I'm cause kinda dunno 1960s 007 1:30 ½"


def random_texts():
    pick = random.Random(0)
    ours = normalizer("en").__closure__[0].cell_contents
    words = sorted(ours.standardize_numbers.words) + sorted(ours.standardize_spellings.mapping)[::9]
    words += LOOSE_WORDS.split()
    return [" ".join(pick.choices(words, k=pick.randint(1, 9))) for _ in range(400)]


def test_english_equals_openai_and_transformers():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer as Copied

    spelling = json.loads(
        files("whisper_normalizer").joinpath("normalizers/english.json").read_text()
    )
    original, copied, ours = EnglishTextNormalizer(), Copied(spelling), normalizer("English")
    for text in [*PUBLISHED, *OTHERS, *random_texts()]:
        assert ours(text) == original(text).strip() == copied(text).strip(), text


@pytest.mark.parametrize("language", ["de", "fr", "hindi", "ja", "Khmer", None])
def test_other_languages_equal_openais_basic_one(language):
    """Letters are split where words are not parted, as for the Whisper paper's figures."""
    original = BasicTextNormalizer(split_letters=language in ("ja", "Khmer"))
    assert normalizer(language, split_letters=False)("ab c") == "ab c"
    for text in [*OTHERS, "Größe, ÜBER (leise) — déjà vu!", "हिन्दी में", "日本語、テスト。", "¿Qué?"]:
        assert normalizer(language)(text) == original(text).strip()


def test_the_language_is_checked_and_symbols_leave_nothing():
    with pytest.raises(InputError, match="Englisch"):
        normalizer("Englisch")
    assert normalizer("en")("(uh) [noise] ?!") == ""
    assert normalizer("de")("— …") == ""
