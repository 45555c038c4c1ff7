"""Log-mel, milliseconds a 30 s clip: ours against Transformers, and against the ways not taken.

    python benchmarks/log_mel.py [--json FILE] [--rounds 20] [AUDIO ...]

Without audio files the clips are noise under a slow tremolo. Each round runs every contender once,
in turn, so that a busy machine is unfair to none; the figures are medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from flax_distil.audio.load import CLIP_SAMPLES, load_audio, pad_or_trim
from flax_distil.audio.log_mel import (
    WINDOW,
    exact_matmul,
    frame,
    hann,
    log_mel,
    mel_by_matrices,
    mel_filters,
)
from flax_distil.parallel.platform import name_platform


def by_matrices(waveform_BN, mels):
    """What accelerators run."""
    return finish(mel_by_matrices(frame(waveform_BN) * hann().astype("f4"), filters(mels)))


def by_full_matrix(waveform_BN, mels):
    """The same without the radix-2 step."""
    phase = 2 * np.pi / WINDOW * np.outer(np.arange(WINDOW), np.arange(WINDOW // 2 + 1))
    matrix = hann()[:, None] * np.concatenate([np.cos(phase), np.sin(phase)], 1)
    cosine, sine = jnp.split(exact_matmul(frame(waveform_BN), matrix.astype("f4")), 2, axis=-1)
    return finish(exact_matmul(cosine**2 + sine**2, filters(mels)))


def finish(mel_BTM):
    log_BTM = jnp.log10(jnp.maximum(mel_BTM, 1e-10))
    return (jnp.maximum(log_BTM, log_BTM.max((1, 2), keepdims=True) - 8) + 4) / 4


def filters(mels):
    return mel_filters(mels).astype(np.float32)


def contenders(mels):
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels)

    def jitted(function):
        compiled = jax.jit(function, static_argnums=1)
        return lambda clips: np.asarray(compiled(jnp.asarray(clips), mels))

    def transformers(extract):
        return lambda clips: extract(clips, "cpu").transpose(0, 2, 1)

    rivals = {
        "Transformers, numpy": transformers(extractor._np_extract_fbank_features),
        "flax-distil": jitted(log_mel),
        "two half matrices": jitted(by_matrices),
        "one full matrix": jitted(by_full_matrix),
    }
    try:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        rivals["Transformers, torch"] = transformers(extractor._torch_extract_fbank_features)
    except ImportError:
        pass
    return rivals


def measure(clips, mels, batch, rounds):
    rivals = contenders(mels)
    clips = np.resize(clips, (batch, CLIP_SAMPLES))
    expected = rivals["Transformers, numpy"](clips)
    errors = {name: float(np.abs(run(clips) - expected).max()) for name, run in rivals.items()}
    times = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run(clips)
            times[name].append(1e3 * (time.perf_counter() - start) / batch)
    slowest = statistics.median(times["Transformers, numpy"])
    return [
        {
            "name": name,
            "mels": mels,
            "batch": batch,
            "milliseconds_a_clip": round(statistics.median(times[name]), 2),
            "best_milliseconds_a_clip": round(min(times[name]), 2),
            "times_faster": round(slowest / statistics.median(times[name]), 1),
            "max_difference": errors[name],
        }
        for name in rivals
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("audio", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    name_platform()

    if options.audio:
        clips = np.stack([pad_or_trim(load_audio(path)) for path in options.audio])
    else:
        noise = np.random.default_rng(0).normal(0, 0.1, (8, CLIP_SAMPLES))
        clips = (noise * np.sin(np.arange(CLIP_SAMPLES) / 5000)).astype(np.float32)

    rows = [
        row
        for mels in (80, 128)
        for batch in (1, 8)
        for row in measure(clips, mels, batch, options.rounds)
    ]
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    versions = {name: version(name) for name in ("jax", "numpy", "transformers")}
    table = Table("", "mels", "batch", "ms a clip", "best", "× numpy", "max difference")
    for row in rows:
        cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
        table.add_row(*cells)
    Console().print(f"{len(clips)} clips; {machine}; {versions}", table, sep="\n")
    if options.json:
        report = {"machine": machine, "versions": versions, "clips": len(clips), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
