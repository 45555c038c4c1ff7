"""Whisper's text normalisers, applied to references and hypotheses before words are counted."""

from collections.abc import Callable
from functools import cache

from flax_distil.text.languages import WITHOUT_SPACES, to_language_code

# Four rules that whisper-normalizer adds to OpenAI's. Published error rates are computed without.
UNPUBLISHED_RULES = (r"\bkinda\b", r"\bsorta\b", r"\bdunno\b", r"\bcause\b")


@cache
def normalizer(language: str | None, split_letters: bool | None = None) -> Callable[[str], str]:
    """Whisper's English normaliser for English, its basic normaliser otherwise.

    English: lower case, no punctuation, fillers or brackets, numbers in digits, contractions and
    British spellings unified. Basic: lower case, no punctuation, brackets or combining marks, as in
    the published figures. The result has no surrounding space.

    language: a code, a name or None.
    split_letters: put spaces between all characters, so that word errors are character errors
        (Whisper paper, appendix C). The default is to do so for the languages of
        `languages.WITHOUT_SPACES`; English text is never split.

    Raises:
        InputError: an unknown language.
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
