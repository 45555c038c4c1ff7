"""Error rates of the student's transcripts on validation sets."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flax_distil.config import DataConfig, DistillConfig
from flax_distil.data.utterances import Utterance, Utterances, read_dataset
from flax_distil.data.windows import DecodedClip, Skipped, decode_clip, window_batches
from flax_distil.decode.recognizer import Recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Params, Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.multihost import host_slice
from flax_distil.text.tokens import WhisperTokens
from flax_distil.text.wer import ErrorCounts, error_rate

log = logging.getLogger(__name__)

SAMPLE = "  %s\n    reference  %s\n    student    %s"


@dataclass(frozen=True)
class Validation:
    """Error rates in percent by set, and their unweighted mean, by which checkpoints are compared.

    rates: what was counted by set: WER or CER, or WER/CER if there are clips of both.
    """

    wer: dict[str, float]
    rates: dict[str, str] = field(default_factory=dict)

    @property
    def macro_average(self) -> float:
        """A set counts the same whatever its size."""
        return sum(self.wer.values()) / len(self.wer)


Validate = Callable[[Params], Validation]
"""Computes the error rates of a whole student with unstacked layers."""


def make_validate(config: DistillConfig, student: Checkpoint) -> Validate | None:
    """Recognition over the sets of `config.validation`; None without sets.

    Raises:
        InputError: a set cannot be read, is a stream, has no usable clip, or two are
            called the same.
    """
    if not (config.validation.labels or config.validation.data):
        return None
    tokens = student.tokens()
    sets = open_sets(config, tokens)
    spec = Spec(student.dims, config.compute.dtype).on(jax.local_devices()[0])

    def validate(params: Params) -> Validation:
        recognizer = Recognizer(spec, params, tokens)
        judged = {
            name: count_errors(recognizer, utterances, config) for name, utterances in sets.items()
        }
        return Validation(
            {name: 100 * counts.rate for name, (counts, _) in judged.items()},
            {name: rate for name, (_, rate) in judged.items()},
        )

    return validate


def open_sets(config: DistillConfig, tokens: WhisperTokens) -> dict[str, Utterances]:
    """The validation sets by name: the last parts of their paths, with configuration and split.
    One clip of each is decoded.

    Raises:
        InputError: as `make_validate`.
    """
    sets: dict[str, Utterances] = {}
    for name, data in data_tables(config).items():
        found = read_dataset(data)
        if not isinstance(found, Utterances):
            raise InputError(f"{data.source} is a stream: validate on files")
        check_usable(data.source, found, config, tokens)
        sets[name] = found
    return sets


def data_tables(config: DistillConfig) -> dict[str, DataConfig]:
    """Where the validation sets are, by name. Raises InputError where two are called the same."""
    tables: dict[str, DataConfig] = {}
    most = config.validation.max_clips
    for data in (*map(DataConfig, map(str, config.validation.labels)), *config.validation.data):
        name = "-".join(filter(None, (Path(data.source).stem, data.config, data.split)))
        if name in tables:
            raise InputError(f"two validation sets are called {name}: rename one's folder")
        limits = [limit for limit in (data.limit, most) if limit is not None]
        tables[name] = replace(data, limit=min(limits, default=None))
    return tables


def check_usable(
    source: str, utterances: Utterances, config: DistillConfig, tokens: WhisperTokens
) -> None:
    """Raises InputError where no clip of a set has a reference and can be decoded."""
    columns, blank = utterances.columns, [None] * len(utterances)
    texts = utterances.column(columns.text) if columns.text else blank
    languages = utterances.column(columns.language) if columns.language else blank
    reason = "its references are blank"
    for number, (text, language) in enumerate(zip(texts, languages, strict=True)):
        if not (text and str(text).strip()):
            continue
        spoken = language or utterances.config.language or config.language
        against = unusable(str(text), spoken, tokens)
        clip = against or decode_clip(utterances[number])
        if isinstance(clip, DecodedClip):
            return
        reason = clip if isinstance(clip, str) else f"{clip.id}: {clip.reason}"
    raise InputError(
        f"{source} has no clip with a reference to validate on ({reason}): mend it or leave it out"
    )


def unusable(text: str, language: str | None, tokens: WhisperTokens) -> str | None:
    """Why this reference cannot be used in this language; None if it can."""
    if reason := tokens.unsupported(language):
        return reason
    blank = not error_rate(language or "en").normalize(text)
    return "the normaliser leaves nothing of its references" if blank else None


def count_errors(
    recognizer: Recognizer, utterances: Sequence[Utterance], config: DistillConfig
) -> tuple[ErrorCounts, str]:
    """Errors of normalised transcripts on all clips that have a reference and can be decoded, and
    whether words (WER) or characters (CER) were counted.

    Each of several hosts takes a part of the clips; all get the sum.
    """
    counts = {"WER": ErrorCounts(), "CER": ErrorCounts()}
    left, shown, tokens = 0, config.validation.samples, recognizer.tokens
    skipped: list[Skipped] = []

    def usable(utterances: Iterable[Utterance]) -> Iterator[Utterance]:
        for utterance in utterances:
            if not utterance.text or not utterance.text.strip():
                continue
            if reason := unusable(utterance.text, utterance.language or config.language, tokens):
                skipped.append(Skipped(utterance.id, reason))
            else:
                yield utterance

    mine = range(len(utterances))[host_slice(len(utterances))]
    waiting = (utterances[number] for number in mine)
    judged = tqdm(waiting, "validation", len(mine), unit="clip", leave=False, delay=5)
    for code, group in groupby(usable(judged), key=lambda one: one.language or config.language):
        options = DecodeOptions(max_tokens=config.validation.max_tokens)
        size, workers = config.validation.batch_size, config.run.workers
        for windows in window_batches(group, size, workers, skipped.append):
            found = recognize(recognizer, windows.waveforms, options, language=code)
            found = found[: len(windows.utterances)]
            for utterance, one in zip(windows.utterances, found, strict=True):
                rate = error_rate(one.language, config.validation.error_rate)
                counts[rate.unit] += rate.count([utterance.text or ""], [one.text])
                if left < shown:
                    log.info(SAMPLE, utterance.id, utterance.text, one.text)
                    left += 1
    if skipped:
        log.warning("%d clips are left out, the first: %s", len(skipped), skipped[0])
    counts = {unit: over_hosts(part) for unit, part in counts.items()}
    whole = counts["WER"] + counts["CER"]
    if not whole.reference_words:
        raise InputError("a validation set has no clip with a reference that can be decoded")
    return whole, "/".join(unit for unit, part in counts.items() if part.reference_words)


def over_hosts(counts: ErrorCounts) -> ErrorCounts:
    """The sum of all hosts' counts, on each of them."""
    if jax.process_count() == 1:
        return counts
    found = multihost_utils.process_allgather(np.array(astuple(counts)))
    return ErrorCounts(*map(int, found.sum(axis=0)))
