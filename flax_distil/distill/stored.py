"""Distilling from distributions that the labels hold: what has to be true for it to be the same.

A stored distribution is the teacher's for one prompt and one sequence of tokens. Whatever changes
the tokens before a place (timestamps dropped, a previous text as prompt, clips packed to windows,
another task) would hold the student against a teacher who read something else, and is refused.
"""

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flax_distil.config import DistillConfig
from flax_distil.data.stored_teacher import StoredForm, read_stored
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.pseudo_label.labeller import fingerprint
from flax_distil.pseudo_label.store import read_settings, shard_files

log = logging.getLogger(__name__)

TAIL_SHARE = 0.1  # of the teacher's probability, above which a run is warned


def stored_form(config: DistillConfig) -> StoredForm | None:
    """How the labels hold their teacher; None where the run has it in memory.

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
                f"{first} holds {described(forms[first])} and {path} {described(forms[path])}: "
                "label both alike"
            )
    return forms[first]


def form(labels: Path) -> StoredForm:
    """How a label store holds its teacher. Raises InputError where it does not."""
    found = StoredForm.of(read_settings(labels))
    if found is None:
        raise InputError(
            f"{labels} holds no distributions of its teacher: label with --teacher-states, or "
            "leave out stored_teacher"
        )
    return found


def described(form: StoredForm) -> str:
    """A form, in an error."""
    if form.width:
        return f"final states of width {form.width}"
    return f"top_k {form.top_k} at temperatures {', '.join(map(str, form.temperatures))}"


def check_stored_teacher(config: DistillConfig, teacher: Checkpoint) -> None:
    """Raises InputError where the stored distributions are not what the student must be near to."""
    held = stored_form(config)
    if held is None:
        return
    if config.loss.mse:
        raise InputError(
            "stored_teacher has no layers' hidden states to be near to: set --loss.mse 0"
        )
    if not held.width and config.loss.temperature not in held.temperatures:
        raise InputError(
            f"the labels hold {described(held)} and the loss asks for {config.loss.temperature}: "
            "take one of them, or label again with --teacher-states or --top-k-temperatures"
        )
    if config.data:
        raise InputError(
            "stored_teacher needs labels as they were written (--labels), not a mixture of data"
        )
    weights = fingerprint(teacher.params)
    for path in config.labels:
        check_store(path, read_settings(path), weights, config)
    if not held.width:
        warn_of_tails(config.labels[0], held.temperatures.index(config.loss.temperature), config)


def warn_of_tails(labels: Path, temperature: int, config: DistillConfig) -> None:
    """Say so where most of what the teacher knows is in no stored token (docs/LOG.md)."""
    share = tail_share(labels, temperature)
    if share > TAIL_SHARE:
        log.warning(
            "at temperature %g, %.0f %% of the teacher's probability is outside of the tokens that "
            "%s holds, and students learn less of it than from a teacher in memory: label with "
            "--teacher-states, see --loss.temperature, or leave out stored_teacher",
            config.loss.temperature,
            100 * share,
            labels,
        )


def tail_share(labels: Path, temperature: int) -> float:
    """The tail's share of the teacher's softened probability: the mean over a store's first rows.

    temperature: its place among the temperatures of the store.
    """
    held = form(labels)
    rows = (
        row
        for _, path in sorted(shard_files(labels).items())
        for batch in pq.ParquetFile(path).iter_batches(64, columns=list(held.columns()))
        for row in batch.to_pylist()
    )
    stored = [one for row in islice(rows, 64) if (one := read_stored(row)) is not None]
    if not stored:
        return 0.0
    at = held.temperatures[temperature]
    tops, tails = (
        np.concatenate([getattr(one, name) for one in stored]).astype(np.float64)
        for name in ("top_log_probabilities", "tails")
    )
    tail = np.exp(tails[:, temperature])
    return float(np.mean(tail / (tail + np.exp(tops / at).sum(axis=1))))


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
