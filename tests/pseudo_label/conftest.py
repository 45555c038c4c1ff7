"""Clips whose pitch tells a fake teacher what to write, so that its labels are known."""

import json
from pathlib import Path

import pytest
from fake_teacher import clip

from flax_distil.config import DataConfig, PseudoLabelConfig


@pytest.fixture
def speech(tmp_path) -> Path:
    """23 files and their manifest; one is damaged, one missing, one without a reference."""
    folder = tmp_path / "speech"
    folder.mkdir()
    rows = []
    for n in range(23):
        (folder / f"{n}.flac").write_bytes(b"not audio" if n == 5 else clip(n))
        rows.append({"audio": f"{n}.flac", "text": f"Clip number {n}!", "speaker": f"s{n % 3}"})
    (folder / "13.flac").unlink()
    del rows[7]["text"]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(speech, tmp_path) -> PseudoLabelConfig:
    return PseudoLabelConfig(
        data=DataConfig(str(speech / "manifest.jsonl")),
        model="fake",
        output_dir=tmp_path / "labels",
        batch_size=3,
        shard_size=4,
        workers=2,
    )
