"""What is to be handed over: a training run's checkpoint, or any Whisper."""

import logging
from pathlib import Path
from typing import Literal

from flax_distil.distill.runs import is_run, trained_student
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint

log = logging.getLogger(__name__)


def read_source(source: str, which: Literal["best", "latest"] | int) -> Checkpoint:
    """The student of the training run in the folder `source`, else the Whisper called so.

    Raises:
        InputError: there is neither, or the run has no such checkpoint.
    """
    run = Path(source).expanduser()
    if not is_run(run):
        return load_checkpoint(source)
    step, student = trained_student(run, which)
    log.info("%s: the student of step %d", run, step)
    return student
