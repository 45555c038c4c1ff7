"""All models decode the same batches in turn, so that errors and speeds are comparable."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32
from rich.console import Console
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, pad_or_trim
from flax_distil.config import DataConfig, EvaluateConfig
from flax_distil.data.utterances import (
    Utterance,
    Utterances,
    UtteranceStream,
    load_waveform,
    read_dataset,
)
from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
from flax_distil.decode.search import Hypothesis
from flax_distil.errors import InputError, check_writable, writing
from flax_distil.evaluate.report import ClipResult, DatasetResult, ModelResult, Report
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import DecodeOptions
from flax_distil.parallel.multihost import from_all_hosts, is_main_host, start
from flax_distil.text.languages import to_language_code
from flax_distil.text.wer import ErrorCounts, error_rate

log = logging.getLogger(__name__)


class ReferenceClip(NamedTuple):
    """A clip with its reference; after decoding, without its waveform."""

    id: str
    waveform: Float32[np.ndarray, "n"]
    reference: str
    language: str
    seconds: float


@dataclass(frozen=True)
class BatchResult:
    """A batch of one language, with each model's hypotheses and seconds."""

    clips: list[ReferenceClip]
    hypotheses: dict[str, list[Hypothesis]]
    seconds: dict[str, float]


def run(config: EvaluateConfig) -> Report:
    """Evaluate `config.models` on `config.datasets`; prints the table and writes the report.

    Raises what `evaluate_models` raises, and InputError where the folder cannot be written.
    """
    start()
    if is_main_host():
        check_writable(config.output_dir)
    report = evaluate_models(config)
    if not is_main_host():
        return report
    Console().print(report.table())
    with writing(config.output_dir):
        report.save(config.output_dir)
    log.info("wrote report.json, report.md and transcripts.jsonl to %s", config.output_dir)
    return report


def evaluate_models(config: EvaluateConfig) -> Report:
    """The report of all models on all datasets; writes nothing.

    Skips, and lists, clips over 30 s, without a reference, with damaged audio, or in a language
    that one of the models does not support.

    Raises:
        InputError: a model or dataset cannot be used, a model does not support `config.language`,
            names collide, or no clip is left.
    """
    names = model_names(config)
    for name in ("batch_size", "passes", "max_tokens"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: use 1 or more")
    sets = {name: open_set(one, config) for name, one in dataset_names(config.datasets).items()}
    recognizers = {
        name: make_recognizer(load_checkpoint(source), config.dtype)
        for name, source in names.items()
    }
    if config.language and (reason := unsupported(recognizers, to_language_code(config.language))):
        raise InputError(reason)
    rounds: list[BatchResult] = []
    skipped: dict[str, list[str]] = {}
    scores: dict[str, list[DatasetResult]] = {name: [] for name in names}
    clips: list[ClipResult] = []
    for dataset, utterances in sets.items():
        found, reasons = transcribe_dataset(recognizers, dataset, utterances, config)
        if not found:
            raise InputError(
                f"{dataset}: none of its {len(reasons)} clips can be used; the first: {reasons[0]}"
            )
        rounds += found
        skipped |= {dataset: reasons} if reasons else {}
        for name in names:
            score, lines = judge(dataset, name, found, config)
            scores[name].append(score)
            clips += lines
    first = next(iter(names))
    models = (
        ModelResult(
            name=name,
            source=source,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(recognizers[name].params)),
            relative_speed=median(one.seconds[first] / one.seconds[name] for one in rounds),
            datasets=tuple(scores[name]),
        )
        for name, source in names.items()
    )
    settings = {
        "device": jax.devices()[0].device_kind,
        "precision": config.dtype,
        "batch size": config.batch_size,
        "timed passes": config.passes,
        "longest transcript": f"{config.max_tokens} tokens",
        "search": "greedy, without timestamps",
        "versions": f"flax-distil {version('flax-distil')}, jax {version('jax')}",
    }
    return Report(tuple(models), skipped, settings, tuple(clips))


def model_names(config: EvaluateConfig) -> dict[str, str]:
    """Name in the report → model. Raises InputError where two have the same name."""
    if not config.models or not config.datasets:
        raise InputError("name at least one model (--models) and one dataset (--datasets)")
    if config.names and len(config.names) != len(config.models):
        raise InputError(f"{len(config.names)} names for {len(config.models)} models")
    names = config.names or tuple(Path(source).name for source in config.models)
    if len(set(names)) < len(names):
        raise InputError(f"several models have the same name ({', '.join(names)}): add --names")
    return dict(zip(names, config.models, strict=True))


def dataset_names(sources: Sequence[str]) -> dict[str, str]:
    """Name in the report → dataset: the last part of its path without the suffix, or the last two
    parts where that is ambiguous. Raises InputError where two names are still the same."""
    for name in (
        lambda path: path.name.removesuffix(".jsonl").removesuffix(".parquet"),
        lambda path: "/".join(path.parts[-2:]),
    ):
        names = {name(Path(source)): source for source in sources}
        if len(names) == len(sources):
            return names
    raise InputError(f"two datasets have the same name: {', '.join(sources)}")


def unsupported(recognizers: Mapping[str, Recognizer], language: str) -> str | None:
    """Which model does not support a language, and why; None where all do."""
    for name, recognizer in recognizers.items():
        if reason := recognizer.tokens.unsupported(language):
            return f"{name}: {reason}"
    return None


def batches(clips: Iterable[ReferenceClip], size: int) -> Iterator[list[ReferenceClip]]:
    """Batches of one language each, in order; incomplete ones come last."""
    waiting: dict[str, list[ReferenceClip]] = {}
    for clip in clips:
        batch = waiting.setdefault(clip.language, [])
        batch.append(clip)
        if len(batch) == size:
            yield waiting.pop(clip.language)
    yield from waiting.values()


def transcribe_batches(
    recognizers: Mapping[str, Recognizer],
    batches: Iterable[list[ReferenceClip]],
    config: EvaluateConfig,
) -> Iterator[BatchResult]:
    """Decode each batch with each model, `config.passes` times; the median time counts.

    The first model changes from batch to batch, so that a machine that slows down slows all alike.
    A batch of a new size is decoded once before, to exclude compilation.
    """
    order, warm = list(recognizers), set()
    for batch in batches:
        waveforms_BN = np.stack([pad_or_trim(clip.waveform) for clip in batch])
        language, options = batch[0].language, DecodeOptions(max_tokens=config.max_tokens)
        hypotheses: dict[str, list[Hypothesis]] = {}
        times: dict[str, list[float]] = {name: [] for name in order}
        for turn in range(config.passes + (len(batch) not in warm)):
            for name in order:
                start = time.perf_counter()
                hypotheses[name] = recognize(
                    recognizers[name], waveforms_BN, options, language=language
                )
                if turn or len(batch) in warm:
                    times[name].append(time.perf_counter() - start)
        warm.add(len(batch))
        order = order[1:] + order[:1]
        results = [clip._replace(waveform=np.empty(0, np.float32)) for clip in batch]
        yield BatchResult(
            results, hypotheses, {name: median(taken) for name, taken in times.items()}
        )


def transcribe_dataset(
    recognizers: Mapping[str, Recognizer],
    name: str,
    utterances: Iterable[Utterance],
    config: EvaluateConfig,
) -> tuple[list[BatchResult], list[str]]:
    """The results of a dataset, and the skipped clips with the reasons.

    Each of n hosts takes every n-th clip; all return the whole.
    """
    host, hosts = jax.process_index(), jax.process_count()
    skipped: list[str] = []
    total = len(range(host, len(utterances), hosts)) if isinstance(utterances, Sized) else None
    ours = iter(tqdm(islice(utterances, host, None, hosts), name, total, unit="clip"))
    clips = usable_clips(ours, skipped, config, recognizers)
    results = list(transcribe_batches(recognizers, batches(clips, config.batch_size), config))
    parts = from_all_hosts((results, skipped))
    return [one for part, _ in parts for one in part], [why for _, part in parts for why in part]


def open_set(source: str, config: EvaluateConfig) -> Utterances | UtteranceStream:
    """A dataset. Raises InputError where it has no references."""
    data = DataConfig(source, split=config.split, language=config.language)
    utterances = read_dataset(replace(data, text_column=config.text_column))
    if utterances.columns.text is None:
        raise InputError(f"{source} has no reference text: name its column as --text-column")
    return utterances


def usable_clips(
    utterances: Iterable[Utterance],
    skipped: list[str],
    config: EvaluateConfig,
    recognizers: Mapping[str, Recognizer],
) -> Iterator[ReferenceClip]:
    """The clips that can be used; adds the others to `skipped`, with the reason."""
    for utterance in utterances:
        try:
            language = to_language_code(config.language or utterance.language or "en")
            if reason := unsupported(recognizers, language):
                raise InputError(reason)
            if not error_rate(language, config.error_rate).normalize(utterance.text or ""):
                raise InputError("no reference")
            waveform = load_waveform(utterance)
            seconds = waveform.size / SAMPLE_RATE
            if waveform.size > CLIP_SAMPLES:
                raise InputError(f"{seconds:.1f} s is over 30 s")
        except (InputError, OSError) as error:
            skipped.append(f"{utterance.id}: {error}")
        else:
            yield ReferenceClip(utterance.id, waveform, utterance.text or "", language, seconds)


def judge(
    dataset: str, model: str, rounds: Sequence[BatchResult], config: EvaluateConfig
) -> tuple[DatasetResult, list[ClipResult]]:
    """One model's errors on one dataset, over all clips and by clip."""
    words, characters, lines = ErrorCounts(), ErrorCounts(), []
    for one in rounds:
        language = one.clips[0].language
        rate, cer = error_rate(language, config.error_rate), error_rate(language, "cer")
        for clip, hypothesis in zip(one.clips, one.hypotheses[model], strict=True):
            texts = [clip.reference], [hypothesis.text]
            counts = rate.count(*texts)
            words += counts
            if config.character_errors:
                characters += cer.count(*texts)
            line = ClipResult(
                dataset=dataset,
                id=clip.id,
                model=model,
                language=language,
                duration=clip.seconds,
                reference=clip.reference,
                text=hypothesis.text,
                wer=100 * counts.rate,
                mean_log_probability=hypothesis.mean_log_probability,
                compression_ratio=hypothesis.compression_ratio,
                rate=rate.unit,
            )
            lines.append(line)
    score = DatasetResult(
        name=dataset,
        clips=len(lines),
        audio_seconds=sum(line.duration for line in lines),
        seconds=sum(one.seconds[model] for one in rounds),
        words=words,
        characters=characters if config.character_errors else None,
        rate="/".join(sorted({line.rate for line in lines}, reverse=True)),
    )
    return score, lines
