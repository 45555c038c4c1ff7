"""The demo's speech: synthetic, and human where apt is available, as FLAC files and manifests."""

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.load import AudioError, encode_flac, load_audio
from flax_distil.audio.noise import white_noise
from flax_distil.cache import cache_folder
from flax_distil.errors import InputError
from flax_distil.fetch.packages import lock
from flax_distil.files import write_whole

log = logging.getLogger(__name__)
T = TypeVar("T")

SYNTHETIC = "hibari-tts 0.2.1, one voice at seven pitches, reading public-domain sentences"
HUMAN = (
    "Asterisk telephone prompts, one speaker (Allison Smith, CC BY-SA 3.0), and LibriVox, "
    "one speaker (public domain)"
)
# One voice at several playback speeds: a higher pitch and shorter vocal tract is another speaker.
PITCHES = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)
TEMPOS = (0.9, 1.15)  # slowest and fastest, relative to the voice's own

TELEPHONE = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
AUDIOBOOK = "pocketsphinx-testdata"
NOT_WORDS = ("letters/", "phonetic/", "silence/")  # spelled signs, code words, nothing
SHORTEST = 0.4  # seconds


@dataclass(frozen=True)
class ManifestClip:
    """One line of a NeMo-style manifest; `audio_filepath` is relative to the manifest's folder."""

    audio_filepath: str
    text: str
    duration: float
    """Seconds."""
    speaker: str
    language: str = "en"


@dataclass(frozen=True)
class DemoSpeech:
    """Manifests of the demo's clips. No text of a held-out clip is in the training set."""

    train: Path
    heldout_synthetic: Path
    heldout_human: Path | None
    """None without apt."""
    non_speech: Path
    """Silence and noise to train on, with empty texts."""
    sources: str
    """Description and origin of the speech, for the report."""


def demo_speech(
    folder: str | Path | None = None,
    seed: int = 0,
    spoken: int | None = None,
    heldout_spoken: int = 60,
    heldout_prompts: int = 120,
    non_speech: int = 24,
) -> DemoSpeech:
    """The demo's clips under `folder` (default: the cache), made if needed, and split.

    Human prompts are downloaded to the cache.

    spoken: number of sentences to synthesise; None for all. heldout_spoken, heldout_prompts,
    non_speech: clips.
    The split depends on `seed` only.

    Raises:
        InputError: too few sentences, or the synthesiser is not installed.
    """
    folder = Path(folder or cache_folder() / "demo-speech")
    texts = shuffled(sentences(), seed)[:spoken]
    if len(texts) <= heldout_spoken:
        raise InputError(
            f"{len(texts)} sentences with {heldout_spoken} held out leave none to train on: "
            f"speak at least {heldout_spoken + 1}"
        )
    synthetic = rebase_paths(folder, synthesise(texts, folder / "synthetic", seed))
    prompts = human_prompts(cache_folder() / "demo-speech" / "human")
    human = rebase_paths(folder, prompts) if prompts else []
    train, heldout = split(shuffled(synthetic, seed), heldout_spoken)
    human_train, human_heldout = split(shuffled(human, seed), heldout_prompts)
    log.info(
        "%d clips to train on (%d human), held out %d synthetic, %d human",
        *(len(train) + len(human_train), len(human_train), len(heldout), len(human_heldout)),
    )
    return DemoSpeech(
        train=write_manifest(folder / "train.jsonl", shuffled(train + human_train, seed)),
        heldout_synthetic=write_manifest(folder / "heldout-synthetic.jsonl", heldout),
        heldout_human=write_manifest(folder / "heldout-human.jsonl", human_heldout)
        if human
        else None,
        non_speech=write_non_speech(folder / "non-speech", non_speech, seed),
        sources=f"{SYNTHETIC}; {HUMAN if human else 'no human speech: no apt here'}",
    )


def split(clips: list[ManifestClip], heldout: int) -> tuple[list[ManifestClip], list[ManifestClip]]:
    """(train, held out): the first `heldout` clips are held out, and their words from training."""

    def words(clip: ManifestClip) -> list[str]:
        return "".join(c for c in clip.text.lower() if c.isalnum() or c == " ").split()

    held_out = [words(clip) for clip in clips[:heldout]]
    return [clip for clip in clips if words(clip) not in held_out], clips[:heldout]


def shuffled(items: list[T], seed: int) -> list[T]:
    """The items in an order determined by `seed`."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


# --- manifests ----------------------------------------------------------------------------------


def write_manifest(path: Path, clips: Iterable[ManifestClip]) -> Path:
    """Write one JSON object per line, atomically."""
    lines = (json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips)
    write_whole(path, "".join(lines).encode())
    return path


def read_manifest(path: Path) -> list[ManifestClip]:
    """The clips of a manifest that `write_manifest` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [ManifestClip(**json.loads(line)) for line in lines]


def rebase_paths(folder: Path, manifest: Path) -> list[ManifestClip]:
    """The clips of a manifest, their paths made relative to `folder`."""
    return [
        replace(clip, audio_filepath=os.path.relpath(manifest.parent / clip.audio_filepath, folder))
        for clip in read_manifest(manifest)
    ]


def write_clip(
    folder: Path, name: str, waveform: np.ndarray, text: str, speaker: str
) -> ManifestClip:
    """Write a waveform as `folder/audio/name.flac`."""
    write_whole(folder / "audio" / f"{name}.flac", encode_flac(waveform))
    return manifest_clip(f"audio/{name}.flac", waveform, text, speaker)


def manifest_clip(path: str, waveform: np.ndarray, text: str, speaker: str) -> ManifestClip:
    """The line of a clip with these samples."""
    return ManifestClip(path, text, round(len(waveform) / SAMPLE_RATE, 3), speaker)


# --- synthetic speech and noise -----------------------------------------------------------------


def sentences() -> list[str]:
    """The demo's English sentences, public domain, from `sentences.txt`."""
    lines = packaged("sentences.txt").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def packaged(name: str) -> str:
    """A text file of this package."""
    return (files("flax_distil.fetch") / name).read_text(encoding="utf-8")


def synthesise(texts: Sequence[str], folder: str | Path, seed: int = 0) -> Path:
    """Synthesise every text to `folder/audio` as 16 kHz FLAC; returns the manifest's path.

    By hibari-tts, whose voice is in its wheel. Speaker (one of seven pitches) and tempo depend on
    `seed` and the text only. Existing clips are kept.

    Raises:
        InputError: hibari-tts is not installed.
    """
    try:
        from hibari import Hibari
    except ImportError:
        raise InputError(
            "synthetic speech needs hibari-tts: pip install 'flax-distil[demo]'"
        ) from None
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    voice = Hibari()
    clips = []
    for text in tqdm(texts, desc="speaking", unit="clip", disable=len(texts) < 50):
        digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
        path = folder / "audio" / f"{digest[:6].hex()}.flac"
        draw = np.random.default_rng(list(digest))
        pitch, tempo = float(draw.choice(PITCHES)), float(draw.uniform(*TEMPOS))
        if not path.is_file():
            spoken = voice(text, speed=tempo / pitch, seed=int(draw.integers(2**31)))
            # Samples interpreted at another rate: pitch and tempo times `pitch`.
            replayed = load_audio(encode_flac(spoken, round(voice.sample_rate * pitch)))
            write_whole(path, encode_flac(replayed))
        clips.append(
            manifest_clip(f"audio/{path.name}", load_audio(path), text, f"hibari-{pitch:.2f}")
        )
    return write_manifest(folder / "manifest.jsonl", clips)


def write_non_speech(folder: Path, count: int, seed: int) -> Path:
    """Write `count` clips of silence, white and brown noise, 2 to 30 s at -70 to -20 dB relative to
    full scale; returns the manifest's path."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        noise = white_noise((seed, number), round(draw.uniform(2, 30) * SAMPLE_RATE))
        kind = ("silence", "white", "brown")[number % 3]
        if kind == "brown":
            noise = np.cumsum(noise - noise.mean())
        level = 0 if kind == "silence" else 10 ** (draw.uniform(-70, -20) / 20)
        sound = (level * noise / noise.std()).astype(np.float32)
        clips.append(write_clip(folder, f"{number:03d}-{kind}", sound, "", kind))
    return write_manifest(folder / "manifest.jsonl", clips)


# --- human speech -------------------------------------------------------------------------------


def human_prompts(folder: str | Path) -> Path | None:
    """The manifest of about 450 FLAC clips of two human speakers; None where apt has none.

    From Debian packages, without root. The telephone prompts are CC BY-SA 3.0; `LICENCE` beside the
    manifest names the author.
    """
    folder = Path(folder)
    manifest = folder / "manifest.jsonl"
    with lock("human-prompts"):
        if manifest.is_file():  # written last
            return manifest
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            if not all(unpack_debian(package, root) for package in TELEPHONE):
                return None
            found = _telephone(root)
            if unpack_debian(AUDIOBOOK, root):
                found += _audiobook(root)
            clips = []
            for source, name, text, speaker in tqdm(found, desc="human prompts", unit="clip"):
                try:
                    waveform = load_audio(source, format="g722" if speaker == "allison" else None)
                except AudioError as error:
                    log.warning("%s", error)
                    continue
                if len(waveform) >= SHORTEST * SAMPLE_RATE:  # not a mere click
                    clips.append(write_clip(folder, name, waveform, text, speaker))
        (folder / "LICENCE").write_text(packaged("human-prompts-licence.txt"))
        return write_manifest(manifest, clips)


def _telephone(root: Path) -> list[tuple[Path, str, str, str]]:
    """(audio, name, text, speaker) of every telephone prompt that is words and nothing else."""
    listing = gzip.decompress(next(root.rglob("core-sounds-en.txt.gz")).read_bytes()).decode()
    voices = next(root.rglob("en_US_f_Allison"))
    found = []
    for line in listing.splitlines():
        name, _, text = line.partition(": ")
        audio = voices / f"{name}.g722"
        words = text and not re.search(r"[\[\]()<>@]", text) and not name.startswith(NOT_WORDS)
        if words and audio.is_file():
            found.append((audio, name.replace("/", "-"), " ".join(text.split()), "allison"))
    return found


def _audiobook(root: Path) -> list[tuple[Path, str, str, str]]:
    """The same of the audiobook: lines of `<s> words </s> (file)`."""
    folder = next(root.rglob("librivox"))
    lines = (folder / "transcription").read_text().splitlines()
    matches = (re.fullmatch(r"<s> (.*) </s> \((.*)\)\s*", line) for line in lines)
    found = [(folder / f"{m[2]}.wav", m[2], m[1], "librivox") for m in matches if m]
    return [one for one in found if one[0].is_file()]


def unpack_debian(package: str, root: Path) -> bool:
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
    if file := next(root.glob(f"{package}_*.deb"), None):
        done = _quiet(["dpkg", "-x", str(file), "."], root)
    if done.returncode or file is None:
        log.warning("cannot unpack %s: %s", package, done.stderr.strip() or "nothing came")
    return done.returncode == 0 and file is not None


def _quiet(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer in 300 s")
