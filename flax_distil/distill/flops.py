"""Floating-point operations of a train step, counted from the sizes, and a device's peak.

A multiply-add is two operations. Compilers count a scanned layer once, and differ in what else they
count: for the MFU only products of matrices count.
"""

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_distil.config import DistillConfig
from flax_distil.data.batches import Batch
from flax_distil.distill.step import TrainSpec
from flax_distil.model.dims import WhisperDims
from flax_distil.model.precision import product as multiply
from flax_distil.parallel.chips import published_peak
from flax_distil.parallel.mesh import make_mesh

log = logging.getLogger(__name__)


def step_flops(
    spec: TrainSpec,
    clips: int,
    length: int,
    encode: bool = True,
    logits: int | None = None,
    short: bool = False,
) -> int:
    """Operations of one update on `clips` with `length` tokens each.

    Forward passes of the shared encoder, the teacher's decoder and the student; the backward pass
    of what is trained costs two forward passes, but the audio states of a frozen encoder need no
    gradient. Recomputation (remat) does not count: it is not useful work.

    Args:
        spec: the step.
        clips: rows of the batch, on all devices.
        length: tokens of each row, padding included.
        encode: false if batches hold audio states.
        logits: tokens whose logits are computed (`vocabulary_tokens`); all if None.
        short: the shared encoder runs for the student again (`audio_context`).
    """
    teacher, student = spec.teacher.dims, spec.student.dims
    logits = clips * length if logits is None else logits
    clip = 0
    if encode and (spec.asks_teacher or spec.shares_encoder):
        clip += encoder_flops(teacher) * (2 if short and spec.shares_encoder else 1)
    if spec.asks_teacher:
        clip += decoder_flops(teacher, length) + cross_flops(teacher)
    if not spec.shares_encoder:
        clip += (3 if spec.train_encoder else 1) * encoder_flops(student)
    clip += 3 * decoder_flops(student, length)
    clip += (3 if spec.train_encoder else 2) * cross_flops(student)
    tokens = 3 * vocabulary_flops(student, logits)
    if spec.loss.kl:
        tokens += vocabulary_flops(teacher, logits)
    return clips * clip + tokens


def batch_flops(spec: TrainSpec, batch: Batch, hosts: int) -> int:
    """Useful operations of one update, from one host's rows of its batch."""
    rows, length = batch.tokens.shape
    # Each host knows its own rows alone, and takes them for any host's.
    shards = max(spec.data_shards // hosts, 1)
    tokens = vocabulary_tokens(batch.weights, spec.accumulation, shards, spec.vocabulary_chunk)
    short = batch.positions is not None
    return step_flops(spec, hosts * rows, length, batch.audio is None, hosts * tokens, short)


def vocabulary_tokens(weights_BL: np.ndarray, accumulation: int, shards: int, chunk: int) -> int:
    """Tokens of a batch whose logits `vocabulary_losses` computes.

    Each of the `accumulation` micro-batches takes as many chunks of each shard as the shard with
    the most tokens of weight other than 0 needs.
    """
    used_BL = np.asarray(weights_BL) != 0
    micro_batches = [used_BL[first::accumulation] for first in range(accumulation)]
    counts = np.reshape(micro_batches, (accumulation, shards, -1))
    most, size = counts.sum(axis=2).max(axis=1), counts.shape[2]
    turn = min(chunk, size) or size
    return int(np.sum(-(-most // turn) * turn)) * shards


def encoder_flops(dims: WhisperDims) -> int:
    """One clip through the encoder."""
    S, D, F = dims.audio_positions, dims.width, dims.encoder_ffn
    convolutions = 3 * 2 * S * dims.mels * D + 3 * S * D * D
    layer = 4 * S * D * D + 2 * S * S * D + 2 * S * D * F
    return 2 * (convolutions + dims.encoder_layers * layer)


def decoder_flops(dims: WhisperDims, length: int) -> int:
    """One clip's tokens through the decoder's layers, without cross keys and values."""
    L, S, D, F = length, dims.audio_positions, dims.width, dims.decoder_ffn
    layer = (4 + 2) * L * D * D + 2 * L * L * D + 2 * L * S * D + 2 * L * D * F
    return 2 * dims.decoder_layers * layer


def cross_flops(dims: WhisperDims) -> int:
    """Keys and values of one clip's audio states for every decoder layer."""
    return 2 * dims.decoder_layers * 2 * dims.audio_positions * dims.width**2


def vocabulary_flops(dims: WhisperDims, tokens: int) -> int:
    """Hidden states of some tokens to logits."""
    return 2 * tokens * dims.width * dims.vocab


def measured_peak(mesh: Mesh, dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of large matrix products on all devices of the mesh at once: a practical ceiling."""
    side = 1024 if mesh.devices.flat[0].platform == "cpu" else 4096
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.jit(lambda: jnp.ones((mesh.size, side, side), dtype), out_shardings=each)()
    square = lambda x: (multiply("nij,njk->nik", x, x) / side).astype(x.dtype)
    product = jax.jit(square, out_shardings=each)
    jax.block_until_ready(product(ones))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        jax.block_until_ready(product(ones))
        best = min(best, time.perf_counter() - begin)
    return 2 * mesh.size * side**3 / best


def peak_flops(config: DistillConfig) -> tuple[float, str]:
    """Peak FLOP/s of one device, and whether it is configured, published or measured."""
    compute, kind = config.compute, jax.devices()[0].device_kind
    peak, source = compute.peak_flops, "configured"
    if peak is None:
        peak, source = published_peak(kind, compute.dtype), "published"
    if peak is None:
        ours = make_mesh(devices=jax.local_devices())  # hosts need not measure at the same time
        peak, source = measured_peak(ours, compute.dtype) / ours.size, "measured in products"
    log.info("MFU is of %.3g FLOP/s a device (%s, %s): %s", peak, kind, compute.dtype, source)
    return peak, source
