"""Whisper's text normalisers, applied to both sides before words are counted."""

from collections.abc import Callable
from functools import cache

from flax_distil.text.languages import WITHOUT_SPACES, to_language_code

# Four rules that whisper-normalizer adds to OpenAI's. Published error rates are computed without.
UNPUBLISHED_RULES = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")


@cache
def normalizer(language: str | None, split_letters: bool | None = None) -> Callable[[str], str]:
    """Whisper's English normaliser for English, its basic one for any other language or None.

    English: lower case, no punctuation, fillers or brackets, numbers in digits, contractions and
    British spellings unified. Basic: lower case, no punctuation or brackets; combining marks go
    too, as in the published figures. The result has no space at either end, so that an empty text
    is "". `language` is a code or a name; InputError for an unknown one.

    split_letters: each character stands alone, as in the Whisper paper (appendix C) for languages
        without spaces between words, so that word errors are character errors; by default for
        those (`languages.WITHOUT_SPACES`), and never for English.
    """
    code = None if language is None else to_language_code(language)
    if code == "en":
        from whisper_normalizer.english import EnglishTextNormalizer

        normalize = EnglishTextNormalizer()
        for rule in UNPUBLISHED_RULES:
            normalize.replacers.pop(rule, None)
    else:
        from whisper_normalizer.basic import BasicTextNormalizer

        split = code in WITHOUT_SPACES if split_letters is None else split_letters
        normalize = BasicTextNormalizer(split_letters=split)
    return lambda text: normalize(text).strip()
