"""Distilling from distributions that the labels hold: what has to be true for it to be the same.

A stored distribution is the teacher's for one prompt and one sequence of tokens. Whatever changes
the tokens before a place (timestamps dropped, a previous text as prompt, clips packed to windows,
another task) would hold the student against a teacher who read something else, and is refused.
"""

from pathlib import Path
from typing import Any

from flax_distil.config import DistillConfig
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.pseudo_label.labeller import fingerprint
from flax_distil.pseudo_label.store import read_settings


def stored_temperatures(config: DistillConfig) -> tuple[float, ...] | None:
    """The temperatures of the labels' tails; None where the run has its teacher in memory.

    Raises:
        InputError: the labels hold no distributions, or those of several stores differ in form.
    """
    if not config.stored_teacher:
        return None
    if not config.labels:
        raise InputError(
            "stored_teacher needs label stores (--labels), as pseudo-label writes them"
        )
    forms = {path: form(path) for path in config.labels}
    first, *others = forms
    for path in others:
        if forms[path] != forms[first]:
            raise InputError(
                f"{first} holds top_k {forms[first][0]} at temperatures {forms[first][1]} and "
                f"{path} {forms[path][0]} at {forms[path][1]}: label both alike"
            )
    return forms[first][1]


def form(labels: Path) -> tuple[int, tuple[float, ...]]:
    """K and temperatures of a label store. Raises InputError where it has none."""
    settings = read_settings(labels)
    if not settings.get("top_k"):
        raise InputError(
            f"{labels} holds no distributions of its teacher: label with --top-k 32, or leave out "
            "stored_teacher"
        )
    return settings["top_k"], tuple(settings["top_k_temperatures"])


def check_stored_teacher(config: DistillConfig, teacher: Checkpoint) -> None:
    """Raises InputError where the stored distributions are not what the student must be near to."""
    temperatures = stored_temperatures(config)
    if temperatures is None:
        return
    if config.loss.mse:
        raise InputError("stored_teacher has no hidden states to be near to: set --loss.mse 0")
    if config.loss.temperature not in temperatures:
        raise InputError(
            f"the labels hold the teacher at temperatures {', '.join(map(str, temperatures))} and "
            f"the loss asks for {config.loss.temperature}: take one of them, or label again with "
            "--top-k-temperatures"
        )
    if config.data:
        raise InputError(
            "stored_teacher needs labels as they were written (--labels), not a mixture of data"
        )
    weights = fingerprint(teacher.params)
    for path in config.labels:
        check_store(path, read_settings(path), weights, config)


def check_store(path: Path, settings: dict[str, Any], weights: str, config: DistillConfig) -> None:
    """Raises InputError where one store was written by another teacher or in another context."""
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
    if settings["task"] != "transcribe":
        raise InputError(f"{path} is translated, and training prompts transcribe: run a teacher")
