"""Human speech with exact texts from Debian packages, where apt is available; without root."""

import gzip
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.load import AudioError, encode_flac, load_audio
from flax_distil.fetch.manifest import ManifestClip, write_manifest
from flax_distil.fetch.packages import lock

log = logging.getLogger(__name__)

TELEPHONE = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
AUDIOBOOK = "pocketsphinx-testdata"
FOREIGN = ("es", "fr", "it", "ru")  # languages that have the same prompts
NOT_WORDS = ("letters/", "phonetic/", "silence/")  # spelled signs, code words, nothing
SHORTEST = 0.4  # seconds
LICENCE = """\
Telephone prompts (speaker allison): Asterisk core sounds, recorded by Allison Smith, copyright
2003-2010, funded by Digium, Inc. Creative Commons Attribution-ShareAlike 3.0:
https://creativecommons.org/licenses/by-sa/3.0/
Changed here: G.722 decoded to 16 kHz FLAC; clips without plain words left out.

Audiobook clips (speaker librivox), where they are there: Sense and Sensibility, LibriVox, public
domain, as in the test data of PocketSphinx.
"""


def human_prompts(folder: str | Path) -> Path | None:
    """The manifest of about 450 FLAC clips of two human speakers; None where apt has none.

    The telephone prompts are CC BY-SA 3.0; `LICENCE` beside the manifest names the author.
    """
    folder = Path(folder)
    manifest = folder / "manifest.jsonl"
    with lock("human-prompts"):
        if manifest.is_file():  # written last
            return manifest
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            if not all(_unpack_debian(package, root) for package in TELEPHONE):
                return None
            found = list(_telephone(root))
            if _unpack_debian(AUDIOBOOK, root):
                found += _audiobook(root)
            (folder / "audio").mkdir(exist_ok=True)
            clips = [
                clip
                for source, text, speaker in tqdm(found, desc="human prompts", unit="clip")
                if (clip := _convert(source, text, speaker, folder)) is not None
            ]
        (folder / "LICENCE").write_text(LICENCE)
        return write_manifest(manifest, clips)


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
                if not _unpack_debian(f"asterisk-core-sounds-{language}-g722", root):
                    return None
                next(root.rglob(f"{language}_*")).rename(home)
    named = {path.relative_to(home).as_posix(): path for path in sorted(home.rglob("*.g722"))}
    return [path for name, path in named.items() if not name.startswith(NOT_WORDS)]


def _unpack_debian(package: str, root: Path) -> bool:
    """Download a Debian package and unpack it under `root`; where that fails, log why: False."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        log.info("no apt-get here: the demo does without human prompts")
        return False
    # root's apt would drop to a user who cannot write here
    get = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
    done = _quiet([*get, "download", package], root)
    if done.returncode and os.geteuid() == 0:  # a bare container has no package lists yet
        _quiet([*get, "update"], root)
        done = _quiet([*get, "download", package], root)
    files = list(root.glob(f"{package}_*.deb"))
    if done.returncode or not files:
        log.warning("apt-get download %s: %s", package, done.stderr.strip() or "nothing came")
        return False
    done = _quiet(["dpkg", "-x", str(files[0]), "."], root)
    if done.returncode:
        log.warning("dpkg -x %s: %s", files[0].name, done.stderr.strip())
    return done.returncode == 0


def _quiet(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer in 300 s")


def _telephone(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(audio, text, speaker) of every telephone prompt that is words and nothing else."""
    listing = next(root.rglob("core-sounds-en.txt.gz"))
    voices = next(root.rglob("en_US_f_Allison"))
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
        name, _, text = line.partition(": ")
        audio = voices / f"{name}.g722"
        words = text and not re.search(r"[\[\]()<>@]", text) and not name.startswith(NOT_WORDS)
        if words and audio.is_file():
            yield audio, " ".join(text.split()), "allison"


def _audiobook(root: Path) -> Iterator[tuple[Path, str, str]]:
    """The same of the audiobook: lines of `<s> words </s> (file)`."""
    folder = next(root.rglob("librivox"))
    for line in (folder / "transcription").read_text().splitlines():
        match = re.fullmatch(r"<s> (.*) </s> \((.*)\)\s*", line)
        if match and (folder / f"{match[2]}.wav").is_file():
            yield folder / f"{match[2]}.wav", match[1], "librivox"


def _convert(source: Path, text: str, speaker: str, folder: Path) -> ManifestClip | None:
    """Write one clip as FLAC; None for one that does not decode or is a mere click."""
    try:
        waveform = load_audio(source, format="g722" if source.suffix == ".g722" else None)
    except AudioError as error:
        log.warning("%s", error)
        return None
    if len(waveform) < SHORTEST * SAMPLE_RATE:
        return None
    stem = source.stem if speaker != "allison" else f"{source.parent.name}-{source.stem}"
    name = f"audio/{stem.removeprefix('en_US_f_Allison-')}.flac"
    (folder / name).write_bytes(encode_flac(waveform))
    return ManifestClip(name, text, round(len(waveform) / SAMPLE_RATE, 3), speaker)
