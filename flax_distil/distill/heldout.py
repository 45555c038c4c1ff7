"""KL and cross-entropy on held-out clips, beside the error rates of `validation`."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from flax_distil.config import DataConfig, DistillConfig, TrainingDataConfig
from flax_distil.data.batches import Batch, TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import open_source
from flax_distil.distill.setup import TrainProgram
from flax_distil.distill.step import Frozen, TrainSpec, evaluation_losses
from flax_distil.distill.validation import data_tables
from flax_distil.errors import InputError
from flax_distil.model.spec import Params
from flax_distil.parallel.mesh import batch_sharding, replicated, within
from flax_distil.parallel.multihost import host_slice
from flax_distil.text.tokens import WhisperTokens


@dataclass(frozen=True)
class HeldOut:
    """One set: its clips in batches like those of training, each clip once."""

    loader: Loader
    size: int

    def batches(self) -> Iterator[Batch]:
        """This host's rows of each batch; the padding of the last one has weight 0."""
        rows = self.loader.batch_size
        mine = np.arange(rows)[host_slice(rows, self.loader.rank, self.loader.hosts)]
        with closing(self.loader.batches(LoaderState())) as batches:  # pyright: ignore
            for number, (batch, _) in enumerate(islice(batches, -(-self.size // rows))):
                real = number * rows + mine < self.size
                yield replace(batch, weights=batch.weights * real[:, None].astype(np.float32))


def held_out(config: DistillConfig, tokens: WhisperTokens) -> dict[str, HeldOut]:
    """The validation sets by name, with labels, or references where there are none.

    Raises InputError if a set has neither.
    """
    if not config.validation.losses:
        return {}
    options = TargetOptions(config.label_buckets, config.timestamp_probability, config.language)
    sets = {}
    for name, data in data_tables(config).items():
        values = {field.name: getattr(data, field.name) for field in fields(DataConfig)}
        found = open_source(TrainingDataConfig(**values), options, tokens)
        speech = [replace(source, weight=1.0) for source in found if source.speech]
        if not speech or speech[0].size is None:
            raise InputError(f"{data.source} has no label or reference to score: leave it out")
        loader = Loader(
            (speech[0],),
            tokens,
            config.batch_size,
            config.run.workers,
            config.run.processes,
            rank=jax.process_index(),
            hosts=jax.process_count(),
        )
        sets[name] = HeldOut(loader, speech[0].size)
    return sets


def score(sets: Mapping[str, HeldOut], params: Params, program: TrainProgram) -> dict[str, float]:
    """KL(teacher ‖ student) and cross-entropy a token at temperature 1 by set, such as `clean/kl`.

    Without the KL if the teacher's decoder is not in memory.
    """
    spec, mesh = program.spec, program.mesh
    step = compiled_losses(spec, mesh)
    place = partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    found: dict[str, float] = {}
    for name, one in sets.items():
        sums = np.zeros(3)
        for batch in one.batches():
            sums += np.asarray(step(params, program.frozen, jax.tree.map(place, batch)))
        kl, ce, tokens = sums / max(sums[2], 1)
        if not tokens:
            raise InputError(f"no clip of the validation set {name} could be used")
        found |= ({f"{name}/kl": kl} if spec.asks_teacher else {}) | {f"{name}/ce": ce}
    return found


@cache
def compiled_losses(spec: TrainSpec, mesh: jax.sharding.Mesh) -> Any:
    """The program: float32[3], the sums of KL, cross-entropy and weights of a batch."""

    def step(params: Params, frozen: Frozen, batch: Batch) -> Any:
        with within(mesh):
            return evaluation_losses(params, frozen, batch, spec)

    return jax.jit(step, out_shardings=replicated(mesh))
