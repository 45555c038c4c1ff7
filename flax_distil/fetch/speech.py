"""The demo's speech: synthetic, and human where apt is available."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.load import encode_flac
from flax_distil.audio.noise import white_noise
from flax_distil.cache import cache_folder
from flax_distil.errors import InputError
from flax_distil.fetch.manifest import ManifestClip, rebase_paths, write_manifest
from flax_distil.fetch.prompts import human_prompts
from flax_distil.fetch.synthesis import sentences, synthesise

log = logging.getLogger(__name__)
T = TypeVar("T")

SYNTHETIC = "hibari-tts 0.2.1, one voice at seven pitches, reading public-domain sentences"
HUMAN = (
    "Asterisk telephone prompts, one speaker (Allison Smith, CC BY-SA 3.0), and LibriVox, "
    "one speaker (public domain)"
)


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
        sources=f"{SYNTHETIC}; {HUMAN}" if human else f"{SYNTHETIC}; no human speech: no apt here",
    )


def write_non_speech(folder: Path, count: int, seed: int) -> Path:
    """Write `count` clips of silence, white and brown noise, 2 to 30 s at -70 to -20 dB relative to
    full scale; returns the manifest's path."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        length = round(draw.uniform(2, 30) * SAMPLE_RATE)
        noise = white_noise((seed, number), length)
        kind = ("silence", "white", "brown")[number % 3]
        if kind == "brown":
            noise = np.cumsum(noise - noise.mean())
        level = 0 if kind == "silence" else 10 ** (draw.uniform(-70, -20) / 20)
        name = f"audio/{number:03d}-{kind}.flac"
        (folder / name).write_bytes(encode_flac((level * noise / noise.std()).astype(np.float32)))
        clips.append(ManifestClip(name, "", round(length / SAMPLE_RATE, 3), kind))
    return write_manifest(folder / "manifest.jsonl", clips)


def split(clips: list[ManifestClip], heldout: int) -> tuple[list[ManifestClip], list[ManifestClip]]:
    """(train, held out): the first `heldout` clips are held out, and their words from training."""
    words = {_words(clip) for clip in clips[:heldout]}
    train = [clip for clip in clips if _words(clip) not in words]
    return train, clips[:heldout]


def shuffled(items: list[T], seed: int) -> list[T]:
    """The items in an order determined by `seed`."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def _words(clip: ManifestClip) -> str:
    return " ".join("".join(c for c in clip.text.lower() if c.isalnum() or c == " ").split())
