"""A random teacher of 2 + 3 layers and batches for it: for tests, and for programs they start."""

from pathlib import Path

import jax
import numpy as np

from flax_distil.data.batches import Batch
from flax_distil.distill.losses import Losses
from flax_distil.distill.step import TrainSpec, student_losses, teach
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.spec import Spec

DIMS = WhisperDims(
    mels=80,
    vocab=96,
    width=32,
    encoder_layers=2,
    encoder_heads=2,
    decoder_layers=3,
    decoder_heads=2,
    encoder_ffn=64,
    decoder_ffn=64,
    audio_positions=16,
    text_positions=12,
)


def random_teacher() -> Checkpoint:
    """A random teacher whose layers are not near-identities, so that mistakes show."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        one = float(path[-1].key == "scale")
        return (one + 0.2 * random.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, Spec(DIMS).abstract())
    generation = {"alignment_heads": [[1, 0], [2, 1]]}
    return Checkpoint(DIMS, params, dims_to_hf(DIMS), generation, Path("nowhere"))


def losses_of(params, frozen, batch: Batch, train_spec: TrainSpec) -> Losses:
    """Sums of the parts over a batch."""
    return student_losses(params, frozen, teach(frozen, batch, train_spec), batch, train_spec)[1]


def random_batch(rows: int = 8, length: int = 8, seed: int = 0) -> Batch:
    """Noise and random tokens; rows have different lengths and a prompt that has no weight."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, DIMS.vocab - 1, (rows, length + 1)).astype(np.int32)
    lengths = random.integers(3, length + 1, rows)
    position = np.arange(length)
    weights = (position >= 1) & (position < lengths[:, None])
    samples = 2 * DIMS.audio_positions * 160
    waveforms = random.integers(-8000, 8000, (rows, samples)).astype(np.int16)
    seconds = np.full(rows, samples / 16_000, np.float32)
    return Batch(
        waveforms,
        tokens[:, :-1],
        tokens[:, 1:],
        weights.astype(np.float32),
        seconds,
        np.arange(rows, dtype=np.int32),
    )
