"""A small run, killed with SIGKILL at random instants until it is done.

    python killed_run.py FOLDER KILLS STEPS

Children are forked before JAX has a device or a thread, so that each begins at once. Prints how
each child ended and which checkpoints lay there then. See tests/distill/test_kills.py.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import orbax.checkpoint  # noqa: F401  what loads late is loaded once, and not by each child
from random_whisper import random_batch, random_teacher

from flax_distil.config import ComputeConfig, DistillConfig, OptimizerConfig, RunConfig
from flax_distil.data.utterances import Utterance
from flax_distil.distill.checkpoints import LATEST, steps
from flax_distil.distill.trainer import train
from flax_distil.model.student import init_student


class Batches:
    """A batch for each position; one byte goes into the pipe `began` for each that is asked for."""

    utterances = tuple(Utterance(f"clip-{row}", b"") for row in range(8))

    def __init__(self, began: int):
        self.began = began

    def batches(self, state):
        while True:
            os.write(self.began, b"1")
            batch = random_batch(8, seed=state.position)
            state = replace(state, position=state.position + 1)
            yield batch, state


def run(folder: Path, steps: int, began: int) -> None:
    """One device; a checkpoint after each update, so that most kills hit the saving of one."""
    teacher = random_teacher()
    config = DistillConfig(
        teacher="teacher",
        student="student",
        labels=(),
        output_dir=folder,
        batch_size=8,
        optimizer=OptimizerConfig(steps=steps, warmup_steps=2, learning_rate=1e-3),
        compute=ComputeConfig(dtype="float32", peak_flops=1e9),
        run=RunConfig(resume="auto", save_every=1, tensorboard=False),
    )
    train(config, teacher, init_student(teacher, 2), Batches(began))


def run_killed(folder: Path, kills: int, until: int) -> None:
    """Every third kill hits the start of a child, the others its updates and checkpoints; one child
    more is asked to stop, by SIGTERM, and the last is left alone."""
    chance = random.Random(0)
    for attempt in range(kills + 2):
        waiting, began = os.pipe()
        child = os.fork()
        if not child:
            run(folder, until, began)
            os._exit(0)
        os.close(began)
        if attempt < kills and attempt % 3 == 2:
            time.sleep(chance.uniform(0.0, 1.0))
        elif attempt <= kills:
            for _ in range(chance.randint(2, 5)):
                os.read(waiting, 1)
            time.sleep(chance.uniform(0.0, 0.15))
        if attempt <= kills:
            os.kill(child, signal.SIGKILL if attempt < kills else signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        os.close(waiting)
        print(os.waitstatus_to_exitcode(status), *steps(folder / LATEST), flush=True)


if __name__ == "__main__":
    run_killed(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
