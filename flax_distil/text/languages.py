"""Whisper's languages, and the conversion of language names to Whisper's codes."""

import re
from difflib import get_close_matches

from flax_distil.errors import InputError

# Codes and names, in the order of the models' language tokens ("yue" only from large-v3 on).
NAMES = """
en English, zh Chinese, de German, es Spanish, ru Russian, ko Korean, fr French, ja Japanese,
pt Portuguese, tr Turkish, pl Polish, ca Catalan, nl Dutch, ar Arabic, sv Swedish, it Italian,
id Indonesian, hi Hindi, fi Finnish, vi Vietnamese, he Hebrew, uk Ukrainian, el Greek, ms Malay,
cs Czech, ro Romanian, da Danish, hu Hungarian, ta Tamil, no Norwegian, th Thai, ur Urdu,
hr Croatian, bg Bulgarian, lt Lithuanian, la Latin, mi Maori, ml Malayalam, cy Welsh, sk Slovak,
te Telugu, fa Persian, lv Latvian, bn Bengali, sr Serbian, az Azerbaijani, sl Slovenian,
kn Kannada, et Estonian, mk Macedonian, br Breton, eu Basque, is Icelandic, hy Armenian,
ne Nepali, mn Mongolian, bs Bosnian, kk Kazakh, sq Albanian, sw Swahili, gl Galician,
mr Marathi, pa Punjabi, si Sinhala, km Khmer, sn Shona, yo Yoruba, so Somali, af Afrikaans,
oc Occitan, ka Georgian, be Belarusian, tg Tajik, sd Sindhi, gu Gujarati, am Amharic,
yi Yiddish, lo Lao, uz Uzbek, fo Faroese, ht Haitian Creole, ps Pashto, tk Turkmen, nn Nynorsk,
mt Maltese, sa Sanskrit, lb Luxembourgish, my Myanmar, bo Tibetan, tl Tagalog, mg Malagasy,
as Assamese, tt Tatar, haw Hawaiian, ln Lingala, ha Hausa, ba Bashkir, jw Javanese,
su Sundanese, yue Cantonese
"""
ALIASES = """
Burmese my, Valencian ca, Flemish nl, Haitian ht, Letzeburgesch lb, Pushto ps, Panjabi pa,
Moldavian ro, Moldovan ro, Sinhalese si, Castilian es, Mandarin zh
"""

LANGUAGES: dict[str, str] = dict(re.findall(r"(\w+) ([\w ]+)", NAMES))

# Scripts without spaces between words. Error rates count their characters (text/wer.py).
WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue", "km", "bo")

CODES = {name.lower(): code for code, name in LANGUAGES.items()}
CODES |= dict(re.findall(r"(\w+) (\w+)", ALIASES.lower()))


def to_language_code(language: str) -> str:
    """Whisper's code of a name or code, with or without a region: `"English"`, `"en-US"` → `"en"`.

    Raises:
        InputError: Whisper does not have the language; the message names the closest matches.
    """
    wanted = language.strip().lower().replace("_", " ")
    head = re.split("[- ]", wanted)[0]
    for name in (wanted, head if len(head) in (2, 3) else ""):
        if name in LANGUAGES:
            return name
        if name in CODES:
            return CODES[name]
    close = get_close_matches(wanted, [*CODES, *LANGUAGES], n=3)
    hint = " or ".join(f'"{match}"' for match in close) or 'a name or code such as "English", "en"'
    raise InputError(f'Whisper has no language "{language}": did you mean {hint}?')
