"""Speed and memory of one model at a time, at fixed batch sizes, compilation apart.

On CPUs every model is measured in a process of its own, so that its peak memory is its own.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from flax_distil.audio.load import pad_or_trim
from flax_distil.config import EvaluateConfig
from flax_distil.evaluate.conditions import ReferenceClip
from flax_distil.evaluate.models import ClipBatch, FlaxModel, load_model
from flax_distil.files import write_whole

ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """One model at one batch size; seconds are medians over rounds of a batch."""

    model: str
    batch: int
    seconds: float
    audio_seconds: float
    tokens: int | None
    first_seconds: float
    """Of the first call: compilation, or taking the program from the cache, and one batch."""
    peak_bytes: int | None
    """Of the process on a CPU, with libraries; else of the device."""
    acceptance: float | None = None
    """Share of the assistant's draft tokens that were accepted."""
    texts: tuple[str, ...] = ()


def measure_latency(
    config: EvaluateConfig,
    sources: Mapping[str, tuple[str, str | None]],
    clips: Sequence[ReferenceClip],
    folder: Path | None,
) -> list[Latency]:
    """All models at the batch sizes of `config.latency`; an earlier run's results are kept.

    sources: name → model and its assistant. clips: of one language, each at most 30 s; repeated
    where a batch is larger. folder: where results are kept.
    """
    kept = None if folder is None else folder / "latency.json"
    asked = json.dumps([config.latency, sources])
    if kept is not None and kept.is_file() and not config.overwrite:
        saved = json.loads(kept.read_text())
        if saved["asked"] == asked:
            return [Latency(**one | {"texts": tuple(one["texts"])}) for one in saved["results"]]
    results: list[Latency] = []
    for name, source in tqdm(sources.items(), "latency", unit="model"):
        if jax.default_backend() == "cpu":
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results += pool.submit(measure_model, config, name, source, clips).result()
        else:
            results += measure_model(config, name, source, clips)
    if kept is not None:
        contents = {"asked": asked, "results": [asdict(one) for one in results]}
        write_whole(kept, json.dumps(contents, indent=1).encode(errors="backslashreplace"))
    return results


def measure_model(
    config: EvaluateConfig,
    name: str,
    source: tuple[str, str | None],
    clips: Sequence[ReferenceClip],
) -> list[Latency]:
    """One model at all batch sizes. source: the model and its assistant."""
    model, results = load_model(name, source[0], config.dtype, source[1]), []
    for size in config.latency:
        some = [clips[row % len(clips)] for row in range(size)]
        waveforms_BN = np.stack([pad_or_trim(clip.waveform) for clip in some])
        batch = ClipBatch(waveforms_BN, some[0].language, max_tokens=config.max_tokens)
        times, outputs = [], []
        for _ in range(1 + ROUNDS):
            begun = time.perf_counter()
            outputs = model.recognize(batch)
            times.append(time.perf_counter() - begun)
        counts = [one.tokens for one in outputs if one.tokens is not None]
        drafted = model.acceptance if isinstance(model, FlaxModel) else None
        results.append(
            Latency(
                model=name,
                batch=size,
                seconds=statistics.median(times[1:]),
                audio_seconds=sum(clip.seconds for clip in some),
                tokens=sum(counts) if len(counts) == size else None,
                first_seconds=times[0],
                peak_bytes=peak_memory(),
                acceptance=drafted and drafted.rate,
                texts=tuple(one.text for one in outputs),
            )
        )
    return results


def peak_memory() -> int | None:
    """Bytes: the device's peak where it is reported, else the process's."""
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        return device["peak_bytes_in_use"]
    # Not getrusage: on Linux its peak includes the parent's at the fork.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if peak is None else 1024 * int(peak.split()[1])
