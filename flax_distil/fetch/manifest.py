"""Clips as FLAC files and a NeMo-style JSONL manifest."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class ManifestClip:
    """One line of a manifest; `audio_filepath` is relative to the manifest's folder."""

    audio_filepath: str
    text: str
    duration: float
    """Seconds."""
    speaker: str
    language: str = "en"


def write_manifest(path: Path, clips: Iterable[ManifestClip]) -> Path:
    """Write one JSON object per line, atomically."""
    half_written = path.with_name(path.name + ".part")
    lines = (json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in clips)
    half_written.write_text("".join(lines), encoding="utf-8")
    os.replace(half_written, path)
    return path


def read_manifest(path: Path) -> list[ManifestClip]:
    """The clips of a manifest that `write_manifest` wrote."""
    return [
        ManifestClip(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()
    ]


def rebase_paths(folder: Path, manifest: Path) -> list[ManifestClip]:
    """The clips of a manifest, their paths made relative to `folder`."""
    return [
        replace(clip, audio_filepath=os.path.relpath(manifest.parent / clip.audio_filepath, folder))
        for clip in read_manifest(manifest)
    ]
