"""One host of tests/distill/test_hosts.py: `python distill_worker.py FOLDER KILL`.

Trains on all hosts' devices. KILL: the step after whose checkpoint the last host dies.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
from random_whisper import random_batch, random_teacher

from flax_distil.config import (
    ComputeConfig,
    DistillConfig,
    OptimizerConfig,
    RunConfig,
    ValidationConfig,
)
from flax_distil.data.utterances import Utterance
from flax_distil.distill.checkpoints import LATEST, steps
from flax_distil.distill.trainer import TrainSummary, train
from flax_distil.distill.validation import Validation
from flax_distil.model.student import init_student
from flax_distil.parallel import multihost


class Batches:
    """This host's rows of one global batch for each position, and its lane of a stream; `before` is
    told the position."""

    utterances = tuple(Utterance(f"clip-{row}", b"") for row in range(16))

    def __init__(self, before):
        self.before = before

    def batches(self, state):
        rows = multihost.host_slice(16)
        while True:
            self.before(state.position)
            batch = random_batch(16, seed=state.position)
            lane = {f"0/{jax.process_index()}": (0, 0, 0, state.position + 1)}
            state = replace(state, position=state.position + 1, streams=lane)
            yield jax.tree.map(lambda leaf: leaf[rows], batch), state


def run(folder: Path, before) -> TrainSummary:
    """A checkpoint every second step, parameters cut over two devices."""
    teacher = random_teacher()
    config = DistillConfig(
        teacher="teacher",
        student="student",
        labels=(),
        output_dir=folder,
        batch_size=16,
        optimizer=OptimizerConfig(1000, warmup_steps=2, learning_rate=1e-3),
        compute=ComputeConfig("float32", fsdp=2, fsdp_min_elements=64, peak_flops=1e9),
        validation=ValidationConfig(every=4),
        run=RunConfig(resume="auto", save_every=2, tensorboard=False),
    )

    def validate(params) -> Validation:
        """Something that each host computes from the whole student, alone."""
        total = sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(params))
        return Validation({"sum": total})

    return train(config, teacher, init_student(teacher, 2), Batches(before), validate)


def main(folder: Path, kill: int) -> None:
    last = jax.process_index() == jax.process_count() - 1

    def before(_: int) -> None:
        if last and kill in steps(folder / LATEST):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # so that the checkpoint is written before many more steps are made

    run(folder, before)


if __name__ == "__main__":
    multihost.start(heartbeat=10, connect=60, notices=True)
    main(Path(sys.argv[1]), int(sys.argv[2]))
