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
from flax_distil.data.stored_teacher import COLUMNS, read_stored
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.pseudo_label.labeller import fingerprint
from flax_distil.pseudo_label.store import read_settings, shard_files

log = logging.getLogger(__name__)

TAIL_SHARE = 0.1  # of the teacher's probability, above which a run is warned


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
    warn_of_tails(config.labels[0], temperatures.index(config.loss.temperature), config)


def warn_of_tails(labels: Path, temperature: int, config: DistillConfig) -> None:
    """Say so where most of what the teacher knows is in no stored token (docs/LOG.md)."""
    share = tail_share(labels, temperature)
    if share > TAIL_SHARE:
        log.warning(
            "at temperature %g, %.0f %% of the teacher's probability is outside of the tokens that "
            "%s holds, and students learn less of it than from a teacher in memory: see "
            "--loss.temperature, or leave out stored_teacher",
            config.loss.temperature,
            100 * share,
            labels,
        )


def tail_share(labels: Path, temperature: int) -> float:
    """The tail's share of the teacher's softened probability: the mean over a store's first rows.

    temperature: its place among the temperatures of the store.
    """
    rows = (
        row
        for _, path in sorted(shard_files(labels).items())
        for batch in pq.ParquetFile(path).iter_batches(64, columns=list(COLUMNS))
        for row in batch.to_pylist()
    )
    stored = [one for row in islice(rows, 64) if (one := read_stored(row)) is not None]
    if not stored:
        return 0.0
    at = read_settings(labels)["top_k_temperatures"][temperature]
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
    if settings["task"] != "transcribe":
        raise InputError(f"{path} is translated, and training prompts transcribe: run a teacher")
