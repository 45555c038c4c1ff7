"""What is to be handed over: a training run's checkpoint, or any Whisper."""

import logging
from pathlib import Path
from typing import Literal

from flax_distil.config import DistillConfig
from flax_distil.distill.checkpoints import read_params
from flax_distil.distill.setup import trainable_part, trained_checkpoint
from flax_distil.distill.trainer import RECIPE
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.recipe import load_recipe

log = logging.getLogger(__name__)


def read_source(source: str, which: Literal["best", "latest"] | int) -> Checkpoint:
    """The student of the training run in the folder `source`, else the Whisper called so.

    Raises:
        InputError: there is neither, or the run has no such checkpoint.
    """
    run = Path(source).expanduser()
    if not (run / RECIPE).is_file():
        return load_checkpoint(source)
    config = load_recipe(run / RECIPE, DistillConfig)
    student, scanned = load_checkpoint(config.student), config.compute.scan_layers
    like = trainable_part(student.params, config.train_encoder, scanned)
    step, trained = read_params(run, like, which)
    log.info("%s: the student of step %d", run, step)
    return trained_checkpoint(trained, student, scanned)
