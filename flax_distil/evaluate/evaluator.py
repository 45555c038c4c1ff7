"""All models decode the same batches in turn, so that errors and speeds are comparable."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, pad_or_trim
from flax_distil.config import EvaluateConfig, EvaluationDataConfig
from flax_distil.data.packing import identity_digest
from flax_distil.data.utterances import Utterances, UtteranceStream, load_waveform, read_dataset
from flax_distil.data.workers import prefetch
from flax_distil.distill.runs import RECIPE
from flax_distil.errors import InputError, SomeFailed, check_writable, writing
from flax_distil.evaluate.conditions import (
    BANK_CLIPS,
    Condition,
    PreviousText,
    ReferenceClip,
    joined,
    noise_conditions,
    non_speech_clips,
)
from flax_distil.evaluate.latency import measure_latency
from flax_distil.evaluate.models import FlaxModel, Model, load_model
from flax_distil.evaluate.report import Report, WorstClip, make_report
from flax_distil.evaluate.results import BatchTime, ClipResult, Output, Part, Results
from flax_distil.options import ChunkedOptions, SequentialOptions
from flax_distil.parallel.multihost import from_all_hosts, is_main_host, start
from flax_distil.pseudo_label.jobs import fingerprint
from flax_distil.recipe import save_recipe
from flax_distil.text.languages import to_language_code
from flax_distil.text.wer import error_rate
from flax_distil.transcription.recordings import LongForm

log = logging.getLogger(__name__)

NON_SPEECH = "generated"  # name of the generated clips without speech
# Options that do not change the results of a part of the evaluation.
IRRELEVANT = ("output_dir", "overwrite", "resamples", "worst", "run", "strict", "latency", "full")
IRRELEVANT += ("noise", "noise_kinds", "prompts", "methods", "chunk_lengths")


@dataclass(frozen=True)
class EvaluationSet:
    """A dataset under its name in the report."""

    name: str
    config: EvaluationDataConfig
    utterances: Utterances | UtteranceStream


def run(config: EvaluateConfig) -> Report:
    """Evaluate `config.models`; prints the tables and writes the reports.

    A killed evaluation continues after its last batch.

    Raises:
        InputError: what `evaluate_models` raises, or the folder cannot be written.
        SomeFailed: with `strict`, clips were skipped.
    """
    start()
    if is_main_host():
        check_writable(config.output_dir)
    report = evaluate_models(config, config.output_dir / "results")
    if not is_main_host():
        return report
    report.print(Console())
    with writing(config.output_dir):
        save_recipe(config, config.output_dir / RECIPE)
        report = replace(report, recipe=(config.output_dir / RECIPE).read_text(encoding="utf-8"))
        report.save(config.output_dir)
    log.info("wrote report.html, report.md and report.json to %s", config.output_dir)
    if config.strict and report.skipped:
        count = sum(map(len, report.skipped.values()))
        raise SomeFailed(f"{count} clips were skipped: see {config.output_dir}/report.md")
    return report


def evaluate_models(config: EvaluateConfig, folder: Path | None = None) -> Report:
    """The report of all models on all datasets.

    Skips, and lists, clips without a reference, with damaged audio, or in a language that one of
    the models does not support.

    folder: where results are kept, so that the next run continues; nothing is written without.

    Raises:
        InputError: a model or dataset cannot be used, a model does not support `config.language`,
            names collide, no clip is left, or `folder` holds results of something else.
    """
    config = expanded(config)
    for name in ("batch_size", "passes", "max_tokens"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: use 1 or more")
    for name in ("latency", "prompts"):
        if min(getattr(config, name), default=1) < 1:
            raise InputError(f"{name} are {getattr(config, name)}: use 1 or more")
    methods(config)  # raises for a chunk that is too long, before any work
    sources, sets = model_names(config), open_sets(config)
    noise = noise_conditions(config.noise, config.noise_kinds, config.noise_recordings)
    models = {
        name: load_model(name, source, config.dtype, assistant)
        for name, (source, assistant) in sources.items()
    }
    if config.language and (reason := unsupported(models, to_language_code(config.language))):
        raise InputError(reason)
    results = Results()
    if folder is not None:
        if jax.process_count() > 1:
            folder = folder / f"host-{jax.process_index()}"
        results = Results.open(folder, settings_key(config, models, sets), config.overwrite)
    evaluation = Evaluation(config, models, results)
    prompts = [Condition("prompt", f"{n} tokens", PreviousText(n)) for n in config.prompts]
    for one in sets:
        evaluation.dataset(one, [Condition("short"), *noise, *prompts])
    if config.non_speech:
        clips = non_speech_clips(config.non_speech, config.seed)
        ours = itertools.islice(clips, jax.process_index(), None, jax.process_count())
        evaluation.clips(NON_SPEECH, ours, [Condition("non-speech")])
    hosts = from_all_hosts((results.clips, results.batches, evaluation.skipped))
    parts = set(evaluation.parts)  # an earlier run may have had others
    results = Results(
        clips=[clip for clips, _, _ in hosts for clip in clips if clip.part in parts],
        batches=[batch for _, some, _ in hosts for batch in some if batch.part in parts],
    )
    skipped = {
        one.name: [reason for *_, some in hosts for reason in some.get(one.name, ())]
        for one in sets
    }
    if not results.clips:
        raise InputError(f"no clip can be used; {first_reason(skipped)}")
    report = make_report(
        config,
        {name: (sources[name][0], model.parameters) for name, model in models.items()},
        {one.name: (one.config.group, one.config.reference) for one in sets},
        results,
        skipped,
        measure_latency(config, sources, timing_clips(sets, config), folder),
    )
    return replace(report, worst=with_audio(report.worst, sets))


def with_audio(clips: Sequence[WorstClip], sets: Sequence[EvaluationSet]) -> list[WorstClip]:
    """The clips with their waveforms; every dataset is read once, up to the last of its clips."""
    places = [next(iter(clip.results.values())) for clip in clips]
    waveforms: dict[tuple[str, str], np.ndarray] = {}
    for one in sets:
        wanted = {place.id for place in places if place.dataset == one.name}
        utterances = one.utterances.iter_from(0) if wanted else iter(())
        while wanted and (utterance := next(utterances, None)):
            if utterance.id in wanted:
                wanted.remove(utterance.id)
                waveforms[one.name, utterance.id] = load_waveform(utterance)
    return [
        clip._replace(waveform=waveforms.get((place.dataset, place.id)))
        for clip, place in zip(clips, places, strict=True)
    ]


def expanded(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with what `full` stands for, where it is not given otherwise."""
    if not config.full:
        return config
    return replace(
        config,
        noise=config.noise or (40.0, 30.0, 20.0, 15.0, 10.0, 5.0, 0.0, -5.0, -10.0),
        prompts=config.prompts or (50, 100, 200),
        non_speech=config.non_speech or 60,
        latency=config.latency or (1, 4, 16),
        chunk_lengths=(30.0, 25.0, 20.0, 15.0, 10.0)
        if config.chunk_lengths == EvaluateConfig.chunk_lengths
        else config.chunk_lengths,
    )


@dataclass
class Evaluation:
    """The work of one host: decodes every batch with every model, and adds to `results`."""

    config: EvaluateConfig
    models: Mapping[str, Model]
    results: Results
    skipped: dict[str, list[str]] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    warm: set[tuple] = field(default_factory=set)
    """Shapes that every model has compiled."""

    def dataset(self, one: EvaluationSet, conditions: Sequence[Condition]) -> None:
        """Clips of at most 30 s under each condition, and longer ones by each method."""
        if not one.config.speech:
            conditions = [Condition("non-speech")]
        self.skipped[one.name], long = [], []
        bank: list[ReferenceClip] = []
        if len(conditions) > 1:
            bank = list(itertools.islice(self.usable(one, [], [], every=1), BANK_CLIPS))
        self.clips(one.name, self.usable(one, self.skipped[one.name], long), conditions, bank)
        join = one.config.join or self.config.join
        for setting, method in methods(self.config).items() if one.config.speech else ():
            if long:
                clips = self.usable(one, [], [], long=True)
                self.recordings(Part("long", setting, one.name), method, clips)
            if join:
                recordings = joined(self.usable(one, [], []), join)
                part = Part("long", setting, f"{one.name} joined")
                self.recordings(part, method, recordings)

    def usable(
        self,
        one: EvaluationSet,
        skipped: list[str],
        too_long: list[str],
        long: bool = False,
        every: int = 0,
    ) -> Iterator[ReferenceClip]:
        """This host's clips of a dataset that can be used, of at most 30 s or over.

        Adds the others' reasons to `skipped`, and the names of those over 30 s to `too_long`.
        every: of n hosts' clips, by default this host's share.
        """
        host, hosts = (0, 1) if every else (jax.process_index(), jax.process_count())
        for utterance in itertools.islice(one.utterances.iter_from(0), host, None, hosts):
            try:
                language = to_language_code(self.config.language or utterance.language or "en")
                if reason := unsupported(self.models, language):
                    raise InputError(reason)
                normalize = error_rate(language, self.config.error_rate).normalize
                if one.config.speech and not normalize(utterance.text or ""):
                    raise InputError("no reference")
                waveform = load_waveform(utterance)
            except (InputError, OSError) as error:
                skipped.append(f"{utterance.id}: {error}")
                continue
            over = waveform.size > CLIP_SAMPLES
            if over:
                too_long.append(utterance.id)
            if over == long:
                text = utterance.text or ""
                yield ReferenceClip(utterance.id, waveform, text, language, utterance.speaker)

    def clips(
        self,
        dataset: str,
        clips: Iterable[ReferenceClip],
        conditions: Sequence[Condition],
        bank: Sequence[ReferenceClip] = (),
    ) -> None:
        """Decode clips of at most 30 s, each batch under all conditions.

        A batch of a new size is decoded once before it is timed, to exclude compilation.
        """
        parts = [Part(one.test, one.setting, dataset) for one in conditions]
        self.parts += parts
        for number, batch in numbered_batches(clips, self.config.batch_size, dataset):
            for condition, part in zip(conditions, parts, strict=True):
                if number >= self.results.resumed[part]:
                    changed = condition.apply(batch, bank, dataset, self.config.seed)
                    self.clip_batch(part, number, list(changed))

    def clip_batch(self, part: Part, number: int, batch: Sequence[ReferenceClip]) -> None:
        """Decode one batch with every model."""
        waveforms_BN = np.stack([pad_or_trim(clip.waveform) for clip in batch])
        previous = [clip.previous for clip in batch] if any(c.previous for c in batch) else ()
        language, most = batch[0].language, self.config.max_tokens
        outputs, seconds = self.timed(
            number,
            lambda model: model.recognize(waveforms_BN, language, previous, most),
            (len(batch), part.setting if previous else None),
        )
        self.add(part, batch, outputs, seconds, windows=len(batch))

    def recordings(self, part: Part, method: LongForm, clips: Iterable[ReferenceClip]) -> None:
        """Transcribe recordings; those of a batch share their windows' batches."""
        self.parts.append(part)
        size, title = self.config.batch_size, f"{part.dataset}, {part.setting}"
        for number, batch in numbered_batches(clips, size, title):
            if number >= self.results.resumed[part]:
                self.recording_batch(part, number, method, batch)

    def recording_batch(
        self, part: Part, number: int, method: LongForm, batch: Sequence[ReferenceClip]
    ) -> None:
        """Transcribe one batch of recordings with every model that has the method."""
        waveforms, language = [clip.waveform for clip in batch], batch[0].language
        size, key = self.config.batch_size, (part.setting, batch_sizes(len(batch)))
        if key not in self.warm:  # batches shrink as recordings end
            for rows in batch_sizes(len(batch)):
                starts = [one[: CLIP_SAMPLES + SAMPLE_RATE] for one in waveforms[:rows]]
                for model in self.models.values():
                    model.transcribe(starts, language, method, size)
            self.warm.add(key)
        texts, seconds = self.timed(
            number, lambda model: model.transcribe(waveforms, language, method, size), key
        )
        outputs = {
            name: [Output(text=text) for text in some]
            for name, some in texts.items()
            if some is not None
        }
        step = 30.0
        if isinstance(method, ChunkedOptions):
            step = method.chunk_length - 2 * method.overlap
        windows = sum(max(1, round(clip.seconds / step)) for clip in batch)
        self.add(part, batch, outputs, seconds, windows)

    def timed(
        self, number: int, decode: Callable[[Model], Any], key: tuple
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """What each model returns, and its seconds: the median of `config.passes`.

        The first model changes from batch to batch, so that a machine that slows down slows all.
        """
        order = list(self.models)
        order = order[number % len(order) :] + order[: number % len(order)]
        outputs: dict[str, Any] = {}
        times: dict[str, list[float]] = {name: [] for name in order}
        for turn in range(self.config.passes + (key not in self.warm)):
            for name in order:
                begun = time.perf_counter()
                outputs[name] = decode(self.models[name])
                if turn or key in self.warm:
                    times[name].append(time.perf_counter() - begun)
        self.warm.add(key)
        return outputs, {name: median(taken) for name, taken in times.items()}

    def add(
        self,
        part: Part,
        batch: Sequence[ReferenceClip],
        outputs: Mapping[str, Sequence[Output]],
        seconds: Mapping[str, float],
        windows: int,
    ) -> None:
        """Add a batch to the results."""
        clips = [
            ClipResult(
                **part._asdict(),
                id=clip.id,
                speaker=clip.speaker,
                model=name,
                language=clip.language,
                seconds=round(clip.seconds, 3),
                reference=clip.reference,
                **asdict(output),
            )
            for name in self.models
            if name in outputs
            for clip, output in zip(batch, outputs[name], strict=True)
        ]
        taken = BatchTime(
            **part._asdict(),
            clips=len(batch),
            audio_seconds=sum(clip.seconds for clip in batch),
            windows=windows,
            seconds={name: seconds[name] for name in self.models if name in outputs},
        )
        self.results.add(clips, taken)


def methods(config: EvaluateConfig) -> dict[str, LongForm]:
    """How recordings are transcribed, by the name of the setting."""
    chosen: dict[str, LongForm] = {}
    if "sequential" in config.methods:
        chosen["sequential"] = SequentialOptions()
    if "chunked" in config.methods:
        chosen |= {f"chunked, {n:g} s": ChunkedOptions(n) for n in config.chunk_lengths}
    return chosen


def model_names(config: EvaluateConfig) -> dict[str, tuple[str, str | None]]:
    """Name in the report → model and its assistant. Raises InputError where names are equal."""
    if not config.models or not (config.datasets or config.data or config.non_speech):
        raise InputError("name at least one model (--models) and one dataset (--datasets)")
    if config.names and len(config.names) != len(config.models):
        raise InputError(f"{len(config.names)} names for {len(config.models)} models")
    names = config.names or tuple(Path(source).name for source in config.models)
    if len(set(names)) < len(names):
        raise InputError(f"several models have the same name ({', '.join(names)}): add --names")
    models: dict[str, tuple[str, str | None]] = {
        name: (source, None) for name, source in zip(names, config.models, strict=True)
    }
    if config.assistant is not None:
        helper = next((n for n, (s, _) in models.items() if s == config.assistant), None)
        name = f"{names[0]} with {helper or Path(config.assistant).name}"
        models[name] = (config.models[0], config.assistant)
    return models


def open_sets(config: EvaluateConfig) -> list[EvaluationSet]:
    """The datasets, with names that differ.

    Raises:
        InputError: a dataset cannot be read or has no references, or two names are equal.
    """
    shared = {name: getattr(config, name) for name in ("config", "split", "text_column")}
    asked = [EvaluationDataConfig(source, **shared) for source in config.datasets]
    asked += config.data
    named = dict(zip(set_names(asked), asked, strict=False))
    if len(named) < len(asked):
        raise InputError("two datasets have the same name: give each a name in the recipe")
    sets = []
    for name, data in named.items():
        data = replace(
            data, limit=config.max_clips or data.limit, language=config.language or data.language
        )
        utterances = read_dataset(data)
        if data.speech and utterances.columns.text is None:
            raise InputError(
                f"{data.source} has no reference text: name its column as --text-column"
            )
        sets.append(EvaluationSet(name, data, utterances))
    return sets


def set_names(asked: Sequence[EvaluationDataConfig]) -> list[str]:
    """Names of datasets: those given, else the last part of the path, the configuration and split;
    the last two parts where names would be equal."""
    names: list[str] = []
    for parts in (1, 2):
        names = []
        for one in asked:
            path = Path(one.source)
            last = "/".join((*path.parts[:-1], path.name)[-parts:])
            for suffix in (".jsonl", ".parquet"):
                last = last.removesuffix(suffix)
            names.append(one.name or " ".join(filter(None, (last, one.config, one.split))))
        if len(set(names)) == len(names):
            break
    return names


def unsupported(models: Mapping[str, Model], language: str) -> str | None:
    """Which model does not support a language, and why; None where all do."""
    for name, model in models.items():
        if reason := model.unsupported(language):
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


def numbered_batches(
    clips: Iterable[ReferenceClip], size: int, title: str
) -> Iterator[tuple[int, list[ReferenceClip]]]:
    """Batches with their numbers, read ahead in a thread, with a progress bar."""
    return iter(tqdm(prefetch(enumerate(batches(clips, size)), 2), title, unit="batch"))


def batch_sizes(rows: int) -> tuple[int, ...]:
    """The sizes that a batch of recordings has while they end one after the other."""
    return tuple(sorted({rows, *(1 << n for n in range(rows.bit_length()))}))


def timing_clips(sets: Sequence[EvaluationSet], config: EvaluateConfig) -> list[np.ndarray]:
    """Waveforms of the first usable clips, enough for the largest batch of the latency test."""
    found: list[np.ndarray] = []
    for one in sets if config.latency else ():
        for utterance in one.utterances.iter_from(0):
            if len(found) == max(config.latency):
                break
            try:
                waveform = load_waveform(utterance)
            except (InputError, OSError):
                continue
            if waveform.size <= CLIP_SAMPLES:
                found.append(waveform)
    return found


def settings_key(
    config: EvaluateConfig, models: Mapping[str, Model], sets: Sequence[EvaluationSet]
) -> dict[str, object]:
    """What determines the results: options, weights and datasets as they are now."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in IRRELEVANT}
    weights = {
        name: fingerprint(model.recognizer.params) if isinstance(model, FlaxModel) else stamp(model)
        for name, model in models.items()
    }
    data = {
        one.name: None
        if isinstance(one.utterances, UtteranceStream)
        else identity_digest(one.utterances)
        for one in sets
    }
    return {"options": options, "weights": weights, "datasets": data}


def stamp(model: Model) -> list[tuple[str, int, int]]:
    """Name, size and time of the files of another library's model."""
    path = Path(model.source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        (one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.is_file()
    ]


def first_reason(skipped: Mapping[str, Sequence[str]]) -> str:
    """The first of the reasons why clips were skipped."""
    for name, reasons in skipped.items():
        if reasons:
            return f"{name} skipped {len(reasons)}, the first: {reasons[0]}"
    return "the datasets are empty"
