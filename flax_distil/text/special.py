"""Special tokens that are written out in texts, such as `<|0.00|>` or `<|endoftext|>`.

Published label sets contain them, and references may. Whisper's normalisers drop them before words
are counted, so they are dropped from training targets too. The timestamps in pseudo-labels become
timestamp tokens.
"""

import re

SPECIAL = re.compile(r"<\|([^<>|\s]{1,40})\|>")
SECONDS = re.compile(r"\d{1,2}\.\d{1,2}")


def strip_special(text: str) -> str:
    """The text without special tokens and without surrounding space."""
    return SPECIAL.sub("", text).strip()


def split_timestamps(text: str) -> list[str | float]:
    """Pieces of text and the seconds of the timestamps between them, in order."""
    found: list[str | float] = [""]
    end = 0
    for token in SPECIAL.finditer(text):
        found[-1] = f"{found[-1]}{text[end : token.start()]}"
        if SECONDS.fullmatch(token[1]):
            found += [float(token[1]), ""]
        end = token.end()
    found[-1] = f"{found[-1]}{text[end:]}"
    return [piece for piece in found if not isinstance(piece, str) or piece.strip()]
