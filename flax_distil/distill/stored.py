"""Distilling from the teacher's final states in the labels: what must hold for it to be exact.

A stored state belongs to one prompt and one sequence of tokens. Whatever changes the tokens before
a place (timestamps dropped, a previous text as prompt, clips packed to windows, another task) would
compare the student with a teacher that was given other tokens, and is refused.
"""

from pathlib import Path
from typing import Any

from flax_distil.config import DistillConfig
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.pseudo_label.identity import fingerprint
from flax_distil.pseudo_label.store import read_settings


def check_stored_teacher(config: DistillConfig, teacher: Checkpoint) -> None:
    """Raises InputError where the stored states are not those of this teacher for these tokens."""
    if not config.stored_teacher:
        return
    if config.loss.mse:
        raise InputError("stored_teacher has no hidden states of layers to match: set --loss.mse 0")
    if config.data or not config.labels:
        raise InputError(
            "stored_teacher needs label stores as pseudo-label writes them: name them with "
            "--labels, and leave out --data"
        )
    weights = fingerprint(teacher.params)
    for path in config.labels:
        check_store(path, read_settings(path), weights, config)


def check_store(path: Path, settings: dict[str, Any], weights: str, config: DistillConfig) -> None:
    """Raises InputError where a store has no states, or those of another teacher or prompt."""
    if not settings.get("teacher_states"):
        raise InputError(
            f"{path} has no final states of its teacher: label with --teacher-states, or leave out "
            "stored_teacher"
        )
    if settings["weights"] != weights:
        raise InputError(
            f"{path} was written by {settings['model']} (weights {settings['weights']}) and the "
            f"teacher is {config.teacher} ({weights}): name that teacher"
        )
    if settings["timestamps"] and config.timestamp_probability != 1:
        raise InputError(
            f"{path} was written with timestamps, and timestamp_probability "
            f"{config.timestamp_probability} would drop some: set it to 1, or label without"
        )
