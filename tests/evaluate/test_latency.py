"""Speed and memory of models alone: what is measured, not how fast it is."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from flax_distil.audio.load import encode_flac
from flax_distil.config import EvaluateConfig
from flax_distil.evaluate import latency
from flax_distil.evaluate.evaluator import evaluate_models
from flax_distil.model.checkpoint import load_checkpoint


def test_a_model_in_a_process_of_its_own(random_folders, human_clips, tmp_path, monkeypatch):
    """Texts are those of the evaluation, parameters those of the folder; measured only once."""
    lines, folder = [], tmp_path / "results"
    for number, (waveform, text) in enumerate(human_clips[:2]):
        (tmp_path / f"{number}.flac").write_bytes(encode_flac(waveform))
        lines.append(json.dumps({"audio": f"{number}.flac", "text": text}))
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    config = EvaluateConfig(
        (str(random_folders[0]),), (str(tmp_path / "clips.jsonl"),), latency=(1, 2), max_tokens=6
    )
    report = evaluate_models(config, folder)
    clips = list(map(json.loads, (folder / "clips.jsonl").read_text().splitlines()))
    one, two = json.loads((folder / "latency.json").read_text())["results"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert two["texts"] == [clip["text"] for clip in clips]
    assert one["texts"] == two["texts"][:1]
    assert two["tokens"] == sum(clip["tokens"] for clip in clips)
    assert two["audio_seconds"] == pytest.approx(sum(len(w) for w, _ in human_clips[:2]) / 16_000)
    params = load_checkpoint(random_folders[0]).params
    assert report.models[0]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = report.to_json()["tables"]["latency"]
    for row, measured in zip(rows, (one, two), strict=True):
        assert row["relative"] == 1
        assert row["ms a batch"] == 1000 * measured["seconds"] > 0
        assert row["RTF"] == measured["seconds"] / measured["audio_seconds"]
        assert row["tokens/s"] == measured["tokens"] / measured["seconds"]
        assert row["first call, s"] > 0
    monkeypatch.setattr(latency, "measure_model", None)
    again = evaluate_models(config, folder)
    assert again.to_json()["tables"]["latency"] == rows
    with pytest.raises(Exception, match="'NoneType' object is not callable"):  # measured anew
        evaluate_models(dataclasses.replace(config, latency=(1,)), folder)


def test_peak_memory_is_that_of_this_process():
    before = latency.peak_memory()
    block = np.ones(2**26, np.uint8)  # 64 MiB
    after = latency.peak_memory()
    assert block.any()
    if before is not None and after is not None:
        assert after >= before > 2**26
