"""One update of distillation, five ways, against the same update in PyTorch.

    python benchmarks/train_step.py [--model whisper-base] [--batch 8] [--tokens 128] [--layers 2]
        [--rounds 3] [--dtype float32] [--chunk 128] [--json FILE]

- Transformers: its modules, one frozen encoder pass for teacher and student, log-mel by its own
  feature extractor in PyTorch, KL + CE, clipping, torch.optim.AdamW.
- plain: our step with the logits of the whole batch; fused: with those of `--chunk` tokens.
- encode once: the audio states come with the batch, as `--audio-states` keeps them.
- stored states: and the teacher's final states, as `--stored-teacher` reads them.

All get the same noise and labels (random lengths up to `--tokens`) and the same weights. A round
runs every way in turn, so that a busy machine is unfair to none; figures are medians over rounds,
ratios medians of the rounds' ratios. MFU: the products of matrices that a way cannot do without,
against the speed of large ones on this machine, measured in each round.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE
from flax_distil.config import ComputeConfig, DistillConfig
from flax_distil.data.batches import Batch
from flax_distil.decode.recognizer import encode
from flax_distil.distill.flops import measured_peak, step_flops, vocabulary_tokens
from flax_distil.distill.setup import compile_step, make_train_spec, split_parameters
from flax_distil.distill.step import TrainSpec, initial_state
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flax_distil.model.student import init_student
from flax_distil.parallel.mesh import make_mesh, shardings
from flax_distil.parallel.platform import name_platform
from flax_distil.pseudo_label.teacher import final_states

PYTORCH = "Transformers"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


class Way(NamedTuple):
    """One way to make an update. step: makes one, waits for it, and returns its loss."""

    step: Callable[[], float]
    flops: int


def random_batch(options: argparse.Namespace, vocabulary: int) -> Batch:
    """Noise of 30 s, prompts and labels of 40 to 100 % of the length."""
    random, rows, length = np.random.default_rng(0), options.batch, options.tokens
    tokens = random.integers(0, vocabulary - 2000, (rows, length + 1)).astype(np.int32)
    ends = random.integers(2 * length // 5, length + 1, rows)
    place = np.arange(length)
    weights = place < ends[:, None]
    return Batch(
        random.integers(-3000, 3000, (rows, CLIP_SAMPLES)).astype(np.int16),
        tokens[:, :-1],
        tokens[:, 1:],
        weights.astype(np.float32),
        np.full(rows, CLIP_SAMPLES / SAMPLE_RATE, np.float32),
        np.arange(rows, dtype=np.int32),
    )


def ours(
    config: DistillConfig,
    train_spec: TrainSpec,
    teacher: Checkpoint,
    student: Checkpoint,
    batch: Batch,
):
    """The trainer's own compiled step, on one device; the state goes on from update to update."""
    mesh = make_mesh(devices=jax.devices()[:1])
    trainable, frozen = split_parameters(train_spec, teacher.params, student.params)
    trainable, frozen, batch = jax.tree.map(jnp.array, (trainable, frozen, batch))
    state = jax.jit(partial(initial_state, config=config.optimizer))(trainable)
    state = jax.device_put(state, shardings(state, mesh))
    program = compile_step(train_spec, mesh, state, {})

    def step() -> float:
        nonlocal state
        state, metrics = program(state, frozen, batch)
        return float(metrics["loss"])

    tokens = vocabulary_tokens(np.asarray(batch.weights), 1, 1, train_spec.vocabulary_chunk)
    encode = batch.audio is None
    return Way(step, step_flops(train_spec, *batch.tokens.shape, encode, tokens))


def pytorch(
    config: DistillConfig, folder: Path, teacher: Checkpoint, student: Checkpoint, batch: Batch
) -> Callable[[], float]:
    """The same update over Transformers' modules."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    models = []
    for name, checkpoint in (("teacher", teacher), ("student", student)):
        save_checkpoint(checkpoint, folder / name)
        model = WhisperForConditionalGeneration.from_pretrained(
            folder / name, dtype=getattr(torch, config.compute.dtype)
        )
        models.append(model.eval())  # no dropout in either
    guide, learner = models
    learner.model.encoder.requires_grad_(False)
    trained = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate, weight_decay=0.0)
    extractor = WhisperFeatureExtractor(feature_size=teacher.dims.mels)
    waveforms = batch.waveforms.astype(np.float32) / 32768
    tokens, targets = (torch.tensor(x).long() for x in (batch.tokens, batch.targets))
    weights, loss, t = torch.tensor(batch.weights), config.loss, config.loss.temperature

    def step() -> float:
        mel = extractor(list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.no_grad():
            audio = guide.model.encoder(mel.input_features.to(guide.dtype)).last_hidden_state
            encoded = BaseModelOutput(last_hidden_state=audio)
            inputs = {"encoder_outputs": encoded, "decoder_input_ids": tokens}
            wanted = guide(**inputs).logits.float()
        logits = learner(**inputs).logits.float()
        kl = F.kl_div(
            F.log_softmax(logits / t, -1), F.log_softmax(wanted / t, -1),
            reduction="none", log_target=True,
        ).sum(-1)  # fmt: skip
        ce = F.cross_entropy(logits.swapaxes(1, 2), targets, reduction="none")
        total = ((loss.kl * t**2 * kl + loss.ce * ce) * weights).sum() / weights.sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_gradient_norm)
        optimizer.step()
        return total.item()

    return step


def ways(options: argparse.Namespace, folder: Path) -> dict[str, Way]:
    """All ways over one batch and the same weights."""
    teacher = load_checkpoint(fetch_weights(options.model))
    student = init_student(teacher, options.layers)
    compute = ComputeConfig(options.dtype, vocabulary_chunk=options.chunk)
    config = DistillConfig("teacher", "student", folder, batch_size=options.batch, compute=compute)
    batch = random_batch(options, teacher.dims.vocab)
    mesh = make_mesh(devices=jax.devices()[:1])
    fused = make_train_spec(config, teacher.dims, student.dims, mesh)
    plain = replace(fused, vocabulary_chunk=0)

    encoder, decoder = (jax.tree.map(jnp.asarray, teacher.params[half]) for half in teacher.params)
    audio = np.asarray(encode(fused.teacher, encoder, batch.waveforms))
    audio = audio.astype(ml_dtypes.bfloat16)  # as it lies on disk
    encoded = replace(batch, audio=audio, waveforms=batch.waveforms[:, :0])
    audio_BSD = jnp.asarray(audio, fused.teacher.dtype)
    given = fused.teacher, decoder, audio_BSD, batch.tokens
    states = np.asarray(final_states(*given))

    make = partial(ours, config)
    made: dict[str, Any] = {
        "plain": make(plain, teacher, student, batch),
        "fused": make(fused, teacher, student, batch),
        "encode once": make(fused, teacher, student, encoded),
        "stored states": make(
            replace(fused, stored_teacher=True),
            teacher,
            student,
            replace(encoded, teacher_states=states),
        ),
    }
    theirs = Way(pytorch(config, folder, teacher, student, batch), made["plain"].flops)
    return {PYTORCH: theirs} | made


def measure(options: argparse.Namespace, made: dict[str, Way]) -> tuple[list[dict], float]:
    """A row a way, and the median of FLOP/s in large matrix products."""
    losses = {name: way.step() for name, way in made.items()}  # compiles, warms up
    seconds: dict[str, list[float]] = {name: [] for name in made}
    peaks = []
    for _ in range(options.rounds):
        peaks.append(measured_peak(make_mesh(devices=jax.devices()[:1]), options.dtype))
        for name, way in made.items():
            start = time.perf_counter()
            way.step()
            seconds[name].append(time.perf_counter() - start)
    peak, times = statistics.median(peaks), {name: np.array(one) for name, one in seconds.items()}
    return [
        {
            "way": name,
            "seconds_a_step": round(float(np.median(times[name])), 3),
            "samples_per_second": round(options.batch / float(np.median(times[name])), 3),
            "times_pytorch": round(float(np.median(times[PYTORCH] / times[name])), 2),
            "times_plain": round(float(np.median(times["plain"] / times[name])), 2),
            "mfu_percent": round(100 * way.flops / float(np.median(times[name])) / peak, 1),
            "loss": round(losses[name], 4),
        }
        for name, way in made.items()
    ], peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="whisper-tiny.en")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="longest label")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the student")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose logits exist")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main():
    options, console = arguments(), Console()
    name_platform()
    report = {
        "machine": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {k: str(v) for k, v in vars(options).items() if k != "json"},
    }
    console.print(report)
    with tempfile.TemporaryDirectory() as folder:
        rows, peak = measure(options, ways(options, Path(folder)))
    report |= {"steps": rows, "matmul_gflops": round(peak / 1e9, 1)}
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=options.model)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table, f"ceiling: {peak / 1e9:.0f} GFLOP/s in {options.dtype} matrix products")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
