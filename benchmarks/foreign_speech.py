"""Telephone prompts in other languages, from Debian packages; used by the tests too."""

import tempfile
from pathlib import Path

from flax_distil.fetch.packages import lock
from flax_distil.fetch.speech import NOT_WORDS, unpack_debian

FOREIGN = ("es", "fr", "it", "ru")  # languages that have the same prompts


def foreign_prompts(language: str, folder: str | Path) -> list[Path] | None:
    """Telephone prompts in one of `FOREIGN` as raw G.722 files, without texts; None without apt.

    All but the spelled letters, code words and pauses. CC BY-SA 3.0; CC BY 3.0 for Russian.
    """
    home = Path(folder) / language
    with lock(f"prompts-{language}"):
        if not home.is_dir():
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                root = Path(temporary)
                if not unpack_debian(f"asterisk-core-sounds-{language}-g722", root):
                    return None
                next(root.rglob(f"{language}_*")).rename(home)
    named = {path.relative_to(home).as_posix(): path for path in sorted(home.rglob("*.g722"))}
    return [path for name, path in named.items() if not name.startswith(NOT_WORDS)]
