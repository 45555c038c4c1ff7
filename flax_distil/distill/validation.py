"""Word error rates by generation: what the student writes, not how it scores labels."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flax_distil.config import DataConfig, DistillConfig
from flax_distil.data.utterances import Utterance, Utterances, read_dataset, to_language
from flax_distil.data.windows import Skipped, window_batches
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import Recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.multihost import host_slice
from flax_distil.text.normalize import normalizer
from flax_distil.text.tokens import load_tokens
from flax_distil.text.wer import ErrorCounts, word_errors

log = logging.getLogger(__name__)

SAMPLE = "  %s\n    said   %s\n    wrote  %s"


@dataclass(frozen=True)
class Validation:
    """WER in percent by set, and their unweighted mean, by which checkpoints are compared."""

    wer: dict[str, float]

    @property
    def macro_average(self) -> float:
        """A set counts the same whatever its size."""
        return sum(self.wer.values()) / len(self.wer)


Validate = Callable[[Params], Validation]
"""Judges a whole student of unstacked layers."""


def make_validate(config: DistillConfig, student: Checkpoint) -> Validate | None:
    """Recognition over the sets of `config.validation`; None where there is no set.

    Raises:
        InputError: a set cannot be read, is a stream, or two are called the same.
    """
    sets = open_sets(config)
    if not sets:
        return None
    spec = Spec(student.dims, config.compute.dtype)
    tokens = load_tokens(student.source)

    def validate(params: Params) -> Validation:
        recognizer = Recognizer(spec, params, tokens)
        counts = {name: judge(recognizer, utterances, config) for name, utterances in sets.items()}
        return Validation({name: 100 * one.rate for name, one in counts.items()})

    return validate


def open_sets(config: DistillConfig) -> dict[str, Utterances]:
    """The validation sets by name: the last parts of their paths."""
    sets: dict[str, Utterances] = {}
    for path in config.validation.labels:
        name = Path(path).stem
        if name in sets:
            raise InputError(f"two validation sets are called {name}: rename one's folder")
        found = read_dataset(DataConfig(str(path), limit=config.validation.max_clips))
        if not isinstance(found, Utterances):
            raise InputError(f"{path} is a stream: validate on files")
        text = found.columns.text
        if text is None or not any(found.column(text)):
            raise InputError(f"{path} has no reference, which validation needs: leave it out")
        sets[name] = found
    return sets


def judge(
    recognizer: Recognizer, utterances: Sequence[Utterance], config: DistillConfig
) -> ErrorCounts:
    """Errors of normalised transcripts on all clips that have a reference and can be heard.

    Several hosts judge a part each, and all are told the whole.
    """
    counts, left, shown = ErrorCounts(), 0, config.validation.samples
    skipped: list[Skipped] = []

    def language(utterance: Utterance) -> str | None:
        code = utterance.language or config.language
        return to_language(code) if code else None

    mine = range(len(utterances))[host_slice(len(utterances))]
    waiting = (utterances[number] for number in mine)
    judged = tqdm(waiting, "validation", len(mine), unit="clip", leave=False, delay=5)
    for code, group in groupby((u for u in judged if u.text), key=language):
        normalise = normalizer(code or (None if recognizer.tokens.multilingual else "en"))
        options = DecodeOptions(language=code, max_tokens=config.validation.max_tokens)
        size, workers = config.validation.batch_size, config.run.workers
        for windows in window_batches(group, size, workers, skipped.append):
            found = recognize(recognizer, windows.waveforms, options)[: len(windows.utterances)]
            references = [normalise(utterance.text or "") for utterance in windows.utterances]
            counts += word_errors(references, [normalise(one.text) for one in found])
            for utterance, one in zip(windows.utterances, found, strict=True):
                if left < shown:
                    log.info(SAMPLE, utterance.id, utterance.text, one.text)
                    left += 1
    if skipped:
        log.warning("%d clips could not be heard, the first: %s", len(skipped), skipped[0])
    counts = over_hosts(counts)
    if not counts.reference_words:
        raise InputError("a validation set has no clip with a reference that can be heard")
    return counts


def over_hosts(counts: ErrorCounts) -> ErrorCounts:
    """The sum of all hosts' counts, known to all: each judges a part of the clips."""
    if jax.process_count() == 1:
        return counts
    found = multihost_utils.process_allgather(np.array(astuple(counts)))
    return ErrorCounts(*map(int, found.sum(axis=0)))
