"""Validation sets: error rates of the student's transcripts, KL and cross-entropy of labels."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_distil.config import DataConfig, DistillConfig, TrainingDataConfig
from flax_distil.data.batches import Batch, TargetOptions
from flax_distil.data.loader import LoaderState
from flax_distil.data.mixing import open_source
from flax_distil.data.utterances import Utterance, Utterances, read_dataset
from flax_distil.data.windows import DecodedClip, Skipped, decode_clip, window_batches
from flax_distil.decode.recognizer import Recognizer, recognize
from flax_distil.distill.setup import Batches, TrainProgram, open_loader
from flax_distil.distill.step import Frozen, TrainSpec, evaluation_losses
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.generation import context_positions
from flax_distil.model.spec import Params, Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import batch_sharding, replicated, within
from flax_distil.parallel.multihost import from_all_hosts, host_slice
from flax_distil.text.tokens import WhisperTokens
from flax_distil.text.wer import ErrorCounts, error_rate

log = logging.getLogger(__name__)

SAMPLE = "  %s\n    reference  %s\n    student    %s"
BLANK = "its references are blank"


@dataclass(frozen=True)
class Validation:
    """Error rates in percent by set, and their unweighted mean, by which checkpoints are compared.

    rates: what was counted by set: WER or CER, or WER/CER if there are clips of both. losses: of
    sets and parts, such as `clean/kl`.
    """

    wer: dict[str, float]
    rates: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def macro_average(self) -> float:
        """A set counts the same whatever its size."""
        return sum(self.wer.values()) / len(self.wer)


Validate = Callable[[Params], Validation]
"""Computes the error rates of a whole student with unstacked layers."""


def data_tables(config: DistillConfig) -> dict[str, DataConfig]:
    """Where the validation sets are, by name: the last parts of their paths, with configuration and
    split. Raises InputError where two are called the same."""
    tables: dict[str, DataConfig] = {}
    most = config.validation.max_clips
    for data in (*map(DataConfig, map(str, config.validation.labels)), *config.validation.data):
        name = "-".join(filter(None, (Path(data.source).stem, data.config, data.split)))
        if name in tables:
            raise InputError(f"two validation sets are called {name}: rename one's folder")
        limits = [limit for limit in (data.limit, most) if limit is not None]
        tables[name] = replace(data, limit=min(limits, default=None))
    return tables


# --- error rates --------------------------------------------------------------------------------


def make_validate(config: DistillConfig, student: Checkpoint) -> Validate | None:
    """Recognition over the sets of `config.validation`; None without sets.

    Raises:
        InputError: a set cannot be read, is a stream, has no usable clip, or two are
            called the same.
    """
    tokens = student.tokens()
    sets, contexts = open_sets(config, tokens), context_positions(config.audio_context)
    spec = Spec(student.dims, config.compute.dtype).on(jax.local_devices()[0])

    def validate(params: Params) -> Validation:
        recognizer = Recognizer(spec, params, tokens, contexts=contexts)
        found = {name: count_errors(recognizer, clips, config) for name, clips in sets.items()}
        return Validation(
            {name: 100 * counts.rate for name, (counts, _) in found.items()},
            {name: unit for name, (_, unit) in found.items()},
        )

    return validate if sets else None


def open_sets(config: DistillConfig, tokens: WhisperTokens) -> dict[str, Utterances]:
    """The validation sets by name. A clip of each that can be used is decoded.

    Raises:
        InputError: as `make_validate`.
    """
    sets: dict[str, Utterances] = {}
    for name, data in data_tables(config).items():
        found, reason = read_dataset(data), BLANK
        if not isinstance(found, Utterances):
            raise InputError(f"{data.source} is a stream: validate on files")
        for utterance in found.iter_from(0):
            clip = unusable(utterance, config, tokens) or decode_clip(utterance)
            if isinstance(clip, DecodedClip):
                break
            if clip != BLANK:
                reason = clip if isinstance(clip, str) else f"{clip.id}: {clip.reason}"
        else:
            raise InputError(
                f"{data.source} has no clip with a reference to validate on ({reason}): mend it or "
                "leave it out"
            )
        sets[name] = found
    return sets


def unusable(utterance: Utterance, config: DistillConfig, tokens: WhisperTokens) -> str | None:
    """Why this clip's reference cannot be used in its language; None if it can."""
    language, text = utterance.language or config.language, (utterance.text or "").strip()
    if not text:
        return BLANK
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
    options, shown = config.validation, 0
    counts = {"WER": ErrorCounts(), "CER": ErrorCounts()}
    skipped: list[Skipped] = []

    mine = range(len(utterances))[host_slice(len(utterances))]
    judged = (utterances[number] for number in mine)

    def usable() -> Iterator[Utterance]:
        for utterance in tqdm(judged, "validation", len(mine), unit="clip", leave=False, delay=5):
            reason = unusable(utterance, config, recognizer.tokens)
            if reason is None:
                yield utterance
            elif reason != BLANK:
                skipped.append(Skipped(utterance.id, reason))

    search = DecodeOptions(max_tokens=options.max_tokens)
    for code, group in groupby(usable(), key=lambda one: one.language or config.language):
        batches = window_batches(group, options.batch_size, config.run.workers, skipped.append)
        for windows in batches:
            found = recognize(recognizer, windows.waveforms, search, language=code)
            for utterance, one in zip(windows.utterances, found, strict=False):
                rate = error_rate(one.language, options.error_rate)
                counts[rate.unit] += rate.count([utterance.text or ""], [one.text])
                if shown < options.samples:
                    log.info(SAMPLE, utterance.id, utterance.text, one.text)
                    shown += 1
    if skipped:
        log.warning("%d clips are left out, the first: %s", len(skipped), skipped[0])
    everywhere = from_all_hosts(counts)
    counts = {unit: sum((one[unit] for one in everywhere), ErrorCounts()) for unit in counts}
    whole = counts["WER"] + counts["CER"]
    if not whole.reference_words:
        raise InputError("a validation set has no clip with a reference that can be decoded")
    return whole, "/".join(unit for unit, part in counts.items() if part.reference_words)


# --- losses -------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """One set: its clips in batches like those of training, and their number."""

    loader: Batches
    size: int


def held_out(config: DistillConfig, tokens: WhisperTokens) -> dict[str, HeldOut]:
    """The validation sets by name, with labels, or references where there are none.

    Raises InputError if a set has neither.
    """
    if not config.validation.losses:
        return {}
    options = TargetOptions(config.label_buckets, config.timestamp_probability, config.language)
    sets = {}
    for name, data in data_tables(config).items():
        values = {field.name: getattr(data, field.name) for field in fields(DataConfig)}
        found = open_source(TrainingDataConfig(**values), options, tokens)
        speech = [replace(source, weight=1.0) for source in found if source.speech]
        if not speech or speech[0].size is None:
            raise InputError(f"{data.source} has no label or reference to score: leave it out")
        sets[name] = HeldOut(open_loader(config, tokens, speech[:1]), speech[0].size)
    return sets


def score(sets: Mapping[str, HeldOut], params: Params, program: TrainProgram) -> dict[str, float]:
    """KL(teacher ‖ student) and cross-entropy a token at temperature 1 by set, such as `clean/kl`.

    Without the KL if the teacher's decoder is not in memory.
    """
    step = compiled_losses(program.spec, program.mesh)
    place = partial(jax.make_array_from_process_local_data, batch_sharding(program.mesh))
    found: dict[str, float] = {}
    for name, one in sets.items():
        sums = np.zeros(3)
        for batch in each_clip_once(one):
            sums += np.asarray(step(params, program.frozen, jax.tree.map(place, batch)))
        kl, ce, tokens = (sums / max(sums[2], 1)).tolist()
        if not tokens:
            raise InputError(f"no clip of the validation set {name} could be used")
        found |= ({f"{name}/kl": kl} if program.spec.asks_teacher else {}) | {f"{name}/ce": ce}
    return found


def each_clip_once(one: HeldOut) -> Iterator[Batch]:
    """This host's rows of each batch; the padding of the last one has weight 0."""
    done = 0
    with closing(one.loader.batches(LoaderState())) as batches:  # pyright: ignore
        for batch, _ in batches:
            rows = len(batch.tokens) * jax.process_count()
            real = done + np.arange(rows)[host_slice(rows)] < one.size
            yield replace(batch, weights=batch.weights * real[:, None].astype(np.float32))
            done += rows
            if done >= one.size:
                return


@cache
def compiled_losses(spec: TrainSpec, mesh: jax.sharding.Mesh) -> Any:
    """The program: float32[3], the sums of KL, cross-entropy and weights of a batch."""

    def step(params: Params, frozen: Frozen, batch: Batch) -> Any:
        with within(mesh):
            return evaluation_losses(params, frozen, batch, spec)

    return jax.jit(step, out_shardings=replicated(mesh))
