"""The loader alone, samples a second and a core, against the train step that it feeds.

    python benchmarks/loader.py [--labels STORE ...] [--json FILE] [--clips 96] [--seconds 12]
                                [--batch 8] [--rounds 3] [--size tiny] [--no-step]

Without label stores the clips are noise under a slow tremolo in a label store of the usual layout:
16 kHz FLAC in Parquet, in random order. The host's work a sample is decoding, int16, padding to
30 s, tokens, the batch; or, with audio states (random ones), reading them. Samples a core are
samples a second of CPU time, which other programs on the machine change little; threads are timed
by the clock. The step has random weights, a teacher of `--size` and a student of two decoder
layers, in float32; with audio states it runs no encoder, and takes more.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from flax_distil.audio.load import encode_flac
from flax_distil.config import (
    AugmentConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    TrainingDataConfig,
)
from flax_distil.data.audio_states import (
    StateFolder,
    StoredAudioStates,
    clip_names,
    load_or_encode,
    split_files,
    write_states,
)
from flax_distil.data.augment import open_noise
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import training_sources
from flax_distil.distill.step import Frozen, TrainSpec, initial_state, train_step
from flax_distil.model.dims import PUBLISHED
from flax_distil.model.spec import Spec
from flax_distil.model.student import layer_map
from flax_distil.parallel.platform import name_platform
from flax_distil.pseudo_label.store import PseudoLabel, open_store
from flax_distil.text.tokens import WhisperTokens

RATE = 16_000
STATES = "4 threads, audio states"
ENGLISH = WhisperTokens(  # no text is made or read here
    Tokenizer(models.BPE()), 50256, 50257, 50358, 50357, 50360, 50361, 50362, False, {}, (), ()
)


def synthetic_store(folder: Path, clips: int, seconds: float) -> Path:
    random = np.random.default_rng(0)
    store = open_store(folder, {"teacher": "noise", "vocabulary": 51864})
    labels = []
    for number in range(clips):
        length = round(RATE * seconds * random.uniform(0.5, 1.5))
        tremolo = np.sin(np.arange(length) / 5000)
        noise = (0.1 * random.normal(size=length) * tremolo).astype(np.float32)
        labels.append(
            PseudoLabel(
                id=str(number),
                audio={"bytes": encode_flac(noise), "path": None},
                reference=None,
                whisper_transcript="",
                token_ids=tuple(random.integers(300, 40_000, round(3 * length / RATE)).tolist()),
                duration=length / RATE,
                language="en",
                speaker=str(number // 8),
                recording=None,
                utterance_number=number,
                mean_log_probability=0.0,
                compression_ratio=1.0,
                no_speech_probability=0.0,
                wer=None,
                word_errors=None,
                reference_words=None,
            )
        )
    store.write_index([store.write(0, labels, {})], complete=True)
    return folder


def random_states(folder: Path, utterances, width: int) -> StoredAudioStates:
    """Audio states of every clip, as training keeps them."""
    clips = len(utterances)
    names = clip_names(range(clips), [""] * clips)
    states = np.random.default_rng(1).normal(size=(8, 1500, width)).astype(ml_dtypes.bfloat16)
    for rows in split_files(np.arange(clips)):
        some = [states[row % len(states)] for row in rows]
        path = folder / f"{rows[0]}.safetensors"
        write_states(path, names[rows], [12.0] * len(rows), some)
    return load_or_encode([StateFolder(folder, names)], utterances, encode=lambda _: None)


def load(config, batch, workers, batches, **changes):
    """Samples a second by the clock and by CPU time, from the second batch on."""
    sources = training_sources(config, ENGLISH)
    loader = Loader(sources, ENGLISH, batch, workers, ahead=0, **changes)
    found = loader.batches(LoaderState())
    next(found)
    clock, cpu = time.perf_counter(), time.process_time()
    seconds = sum(float(b.seconds.sum()) for b, _ in islice(found, batches))
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    found.close()
    return {
        "samples_a_second": batch * batches / clock,
        "samples_a_core": batch * batches / cpu,
        "audio_hours_a_core_hour": seconds / cpu,
    }


def step_speed(config, size, batch, rounds, states=None):
    """Samples a second of the train step on the default device, median over rounds."""
    teacher = PUBLISHED[size]
    student = teacher.__class__(**vars(teacher) | {"decoder_layers": 2})
    loss, optimizer = LossConfig(), OptimizerConfig()
    layers = layer_map(2, teacher.decoder_layers)
    train_spec = TrainSpec(
        Spec(teacher), Spec(student), loss, optimizer, layers, vocabulary_chunk=256
    )
    trainable = {"decoder": Spec(student).init(jax.random.key(0))["decoder"]}
    state = jax.jit(initial_state, static_argnums=1)(trainable, optimizer)
    frozen = Frozen(Spec(teacher).init(jax.random.key(1)), {})
    step = jax.jit(train_step, static_argnames="spec", donate_argnums=0)
    loader = Loader(training_sources(config, ENGLISH), ENGLISH, batch, states=states)
    batches, times = loader.batches(LoaderState()), []
    read, _ = next(batches)  # one batch again and again: one program
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, metrics = step(state, frozen, read, spec=train_spec)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    batches.close()
    return batch / statistics.median(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", nargs="*", type=Path, default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="tiny.en")
    parser.add_argument("--no-step", action="store_true")
    options = parser.parse_args()
    name_platform()

    with tempfile.TemporaryDirectory() as folder:
        stores = options.labels or [
            synthetic_store(Path(folder) / "labels", options.clips, options.seconds)
        ]
        table = TrainingDataConfig(str(stores[0]), pack_seconds=30.0)
        plain = DistillConfig("", "", Path(folder), labels=tuple(stores))
        packed = DistillConfig("", "", Path(folder), data=(table,))
        utterances = training_sources(plain, ENGLISH)[0].utterances
        width = PUBLISHED[options.size].width
        states = random_states(Path(folder) / "states", utterances, width)
        noisy = open_noise(AugmentConfig(noise=stores[0], noise_probability=1.0))
        ways = {
            "1 thread": (plain, 1, {}),
            "2 threads": (plain, 2, {}),
            "4 threads": (plain, 4, {}),
            "4 threads, noise added": (plain, 4, {"add_noise": noisy}),
            "4 threads, windows of 30 s": (packed, 4, {}),
            STATES: (plain, 4, {"states": states}),
        }
        count = max(options.clips // options.batch, 4)
        rows = []
        for name, (config, workers, changes) in ways.items():
            rounds = [
                load(config, options.batch, workers, count, **changes)
                for _ in range(options.rounds)
            ]
            medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
            rows.append({"name": name} | medians)
        speeds = {}
        if not options.no_step:
            take = partial(step_speed, plain, options.size, options.batch, options.rounds)
            speeds = {False: take(), True: take(states)}

    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    shown = Table("", "samples/s", "samples/s a core", "audio h a core-hour", "× the step")
    for row in rows:
        speed = speeds.get(row["name"] == STATES)
        times = "" if speed is None else f"{row['samples_a_second'] / speed:.0f}"
        figures = (row["samples_a_second"], row["samples_a_core"], row["audio_hours_a_core_hour"])
        shown.add_row(row["name"], *(f"{figure:.0f}" for figure in figures), times)
    Console().print(f"batch {options.batch}; {machine}", shown, sep="\n")
    for from_states, speed in speeds.items():
        how = "from audio states" if from_states else "with the encoder"
        print(f"train step, {options.size}, 2 decoder layers, {how}: {speed:.2f} samples/s")
    if options.json:
        report = {
            "machine": machine,
            "batch": options.batch,
            "rows": rows,
            "step": list(speeds.values()),
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
