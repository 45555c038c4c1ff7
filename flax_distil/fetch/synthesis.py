"""Synthetic speech for the demo, by hibari-tts, whose voice is in its wheel."""

import hashlib
import logging
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.load import encode_flac, load_audio
from flax_distil.errors import InputError
from flax_distil.fetch.manifest import ManifestClip, write_manifest

log = logging.getLogger(__name__)

# One voice at several playback speeds: a higher pitch and shorter vocal tract is another speaker.
PITCHES = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)
TEMPOS = (0.9, 1.15)  # slowest and fastest, relative to the voice's own


def sentences() -> list[str]:
    """The demo's English sentences, public domain, from `sentences.txt`."""
    text = (files("flax_distil.fetch") / "sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def synthesise(texts: Sequence[str], folder: str | Path, seed: int = 0) -> Path:
    """Synthesise every text to `folder/audio` as 16 kHz FLAC; returns the manifest's path.

    Speaker (one of seven pitches) and tempo depend on `seed` and the text only. Existing clips are
    kept.

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
            half_written = path.with_suffix(".part")
            half_written.write_bytes(encode_flac(replayed))
            os.replace(half_written, path)
        seconds = len(load_audio(path)) / SAMPLE_RATE
        name = str(path.relative_to(folder))
        clips.append(ManifestClip(name, text, round(seconds, 3), f"hibari-{pitch:.2f}"))
    return write_manifest(folder / "manifest.jsonl", clips)
