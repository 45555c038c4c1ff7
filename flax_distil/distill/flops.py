"""Floating-point operations of a train step, counted from the sizes; a multiply-add is two.

Compilers count a scanned layer once, and differ in what else they count: for the MFU only products
of matrices matter.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_distil.distill.step import TrainSpec
from flax_distil.model.dims import WhisperDims
from flax_distil.model.precision import product as multiply


def step_flops(
    spec: TrainSpec,
    batch_size: int,
    length: int,
    own_encoder: bool,
    train_encoder: bool,
    encode: bool = True,
    logits: int | None = None,
) -> int:
    """Operations of one update on `batch_size` clips with `length` tokens each.

    logits: tokens whose logits are computed (`vocabulary_tokens`); all of them where not given.

    Forward passes of the shared encoder, the teacher's decoder and the student; the backward pass
    of what is trained costs two forward passes, but the audio states of a frozen encoder need no
    gradient. Recomputation (remat) does not count: it is no useful work.
    """
    teacher, student, loss = spec.teacher.dims, spec.student.dims, spec.loss
    shared = encode and (spec.asks_teacher or not own_encoder)
    logits = batch_size * length if logits is None else logits
    clip = encoder_flops(teacher) if shared else 0
    tokens = 3 * vocabulary_flops(student, logits)
    if spec.asks_teacher:
        clip += decoder_flops(teacher, length) + cross_flops(teacher)
    if loss.kl:
        tokens += vocabulary_flops(teacher, logits)
    if own_encoder:
        clip += (3 if train_encoder else 1) * encoder_flops(student)
    clip += 3 * decoder_flops(student, length)
    clip += (3 if train_encoder else 2) * cross_flops(student)
    return batch_size * clip + tokens


def vocabulary_tokens(weights_BL: np.ndarray, accumulation: int, shards: int, chunk: int) -> int:
    """Tokens of a batch whose logits `vocabulary_losses` computes.

    Each of the `accumulation` micro-batches takes as many chunks of each shard as the shard with
    the most tokens of weight other than 0 needs.
    """
    used_BL = np.asarray(weights_BL) != 0
    total = 0
    for micro_BL in (used_BL[first::accumulation] for first in range(accumulation)):
        counts = micro_BL.reshape(shards, -1).sum(axis=1)
        size = micro_BL.size // shards
        turn = min(chunk, size) or size
        total += -(-int(counts.max()) // turn) * turn * shards
    return total


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
    shape = (mesh.size, side, side)
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @partial(jax.jit, out_shardings=each)
    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        wide = multiply("nij,njk->nik", left, right)
        return (wide / side).astype(left.dtype)

    ones = jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=each)()
    jax.block_until_ready(product(ones, ones))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        jax.block_until_ready(product(ones, ones))
        best = min(best, time.perf_counter() - begin)
    return 2 * mesh.size * side**3 / best
