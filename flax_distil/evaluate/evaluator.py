"""All models decode the same batches in turn, so that errors and speeds are comparable."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import jax
import numpy as np
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, pad_or_trim
from flax_distil.config import EvaluateConfig
from flax_distil.data.utterances import load_waveform
from flax_distil.data.workers import prefetch
from flax_distil.distill.runs import RECIPE
from flax_distil.errors import InputError, SomeFailed, check_writable, writing
from flax_distil.evaluate.conditions import (
    BANK_CLIPS,
    Condition,
    ReferenceClip,
    joined,
    non_speech_clips,
)
from flax_distil.evaluate.jobs import EvaluationJob, EvaluationSet, prepare
from flax_distil.evaluate.latency import Latency, measure_latency
from flax_distil.evaluate.models import ClipBatch, Model, RecordingBatch, load_model
from flax_distil.evaluate.report import Report, WorstClip, make_report
from flax_distil.evaluate.results import BatchTime, ClipResult, Output, Part, Results
from flax_distil.options import ChunkedOptions
from flax_distil.parallel.multihost import from_all_hosts, is_main_host, start
from flax_distil.pseudo_label.shards import batches_by
from flax_distil.recipe import save_recipe
from flax_distil.text.languages import to_language_code
from flax_distil.text.wer import error_rate
from flax_distil.transcription.recordings import LongForm

log = logging.getLogger(__name__)

NON_SPEECH = "generated"  # name of the generated clips without speech


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
    report.print()
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
    job = prepare(config)
    config = job.config
    models = {
        name: load_model(name, source, config.dtype, assistant)
        for name, (source, assistant) in job.sources.items()
    }
    if config.language and (reason := unsupported(models, config.language)):
        raise InputError(reason)
    results = Results()
    if folder is not None:
        if jax.process_count() > 1:
            folder = folder / f"host-{jax.process_index()}"
        results = Results.open(folder, job.key(models), config.overwrite)
    evaluation = Evaluation(job, models, results)
    for one in job.sets:
        evaluation.dataset(one)
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
        for one in job.sets
    }
    if not results.clips:
        few = ((name, reasons) for name, reasons in skipped.items() if reasons)
        why = next((f"{n} skipped {len(all)}, the first: {all[0]}" for n, all in few), None)
        raise InputError(f"no clip can be used; {why or 'the datasets are empty'}")
    report = make_report(
        config,
        {name: (job.sources[name][0], model.parameters) for name, model in models.items()},
        {one.name: (one.config.group, one.config.reference) for one in job.sets},
        results,
        skipped,
        evaluation.latency(folder),
    )
    return replace(report, worst=with_audio(report.worst, job.sets))


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


@dataclass
class Evaluation:
    """The work of one host: decodes every batch with every model, and adds to `results`."""

    job: EvaluationJob
    models: Mapping[str, Model]
    results: Results
    skipped: dict[str, list[str]] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    warm: set[tuple] = field(default_factory=set)
    """Shapes that every model has compiled."""

    def dataset(self, one: EvaluationSet) -> None:
        """Clips of at most 30 s under each condition, and longer ones by each method."""
        conditions = self.job.conditions if one.config.speech else [Condition("non-speech")]
        self.skipped[one.name], long = [], []
        bank: list[ReferenceClip] = []
        if len(conditions) > 1:
            bank = list(itertools.islice(self.usable(one, every=True), BANK_CLIPS))
        if sum(bool(clip.waveform.any()) for clip in bank) < 2:
            alone = [c for c in conditions if c.setting.startswith("babble")]
            conditions = [c for c in conditions if c not in alone]
            if alone:
                log.warning("%s: no babble, which is made of other clips than the one", one.name)
        usable = self.usable(one, self.skipped[one.name], long)
        self.clips(one.name, usable, conditions, bank)
        join = one.config.join or self.job.config.join
        for setting, method in self.job.methods.items() if one.config.speech else ():
            if long:
                clips = self.usable(one, long=True)
                self.recordings(Part("long", setting, one.name), method, clips)
            if join:
                recordings = joined(self.usable(one), join)
                part = Part("long", setting, f"{one.name} joined")
                self.recordings(part, method, recordings)

    def usable(
        self,
        one: EvaluationSet,
        skipped: list[str] | None = None,
        too_long: list[str] | None = None,
        long: bool = False,
        every: bool = False,
    ) -> Iterator[ReferenceClip]:
        """The clips of a dataset that can be used, of at most 30 s or over.

        Adds the others' reasons to `skipped`, and the names of those over 30 s to `too_long`.
        every: of all hosts, not only this host's share.
        """
        host, hosts = (0, 1) if every else (jax.process_index(), jax.process_count())
        config = self.job.config
        for utterance in itertools.islice(one.utterances.iter_from(0), host, None, hosts):
            try:
                language = to_language_code(config.language or utterance.language or "en")
                if reason := unsupported(self.models, language):
                    raise InputError(reason)
                normalize = error_rate(language, config.error_rate).normalize
                if one.config.speech and not normalize(utterance.text or ""):
                    raise InputError("no reference")
                waveform = load_waveform(utterance)
            except (InputError, OSError) as error:
                if skipped is not None:
                    skipped.append(f"{utterance.id}: {error}")
                continue
            over = waveform.size > CLIP_SAMPLES
            if over and too_long is not None:
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
        """Decode clips of at most 30 s, each batch under all conditions."""
        config, parts = self.job.config, [Part(c.test, c.setting, dataset) for c in conditions]
        self.parts += parts
        for number, batch in self.batches(clips, dataset):
            for condition, part in zip(conditions, parts, strict=True):
                if number < self.results.resumed[part]:
                    continue
                changed = list(condition.apply(batch, bank, dataset, config.seed))
                given = ClipBatch(
                    np.stack([pad_or_trim(clip.waveform) for clip in changed]),
                    batch[0].language,
                    [clip.previous for clip in changed] if condition.test == "prompt" else (),
                    config.max_tokens,
                )
                shape = (len(batch), part.setting if given.previous else None)
                decode = lambda model, given=given: model.recognize(given)
                self.decode(part, number, changed, decode, shape, windows=len(batch))

    def recordings(self, part: Part, method: LongForm, clips: Iterable[ReferenceClip]) -> None:
        """Transcribe recordings; those of a batch share their windows' batches."""
        self.parts.append(part)
        size, step = self.job.config.batch_size, 30.0
        if isinstance(method, ChunkedOptions):
            step = method.chunk_length - 2 * method.overlap
        for number, batch in self.batches(clips, f"{part.dataset}, {part.setting}"):
            if number < self.results.resumed[part]:
                continue
            waveforms, language = [clip.waveform for clip in batch], batch[0].language
            # Batches shrink as recordings end: all their sizes are compiled before one is timed.
            sizes = sorted({len(batch), *(1 << n for n in range(len(batch).bit_length()))})
            shape = (part.setting, *sizes)
            if shape not in self.warm:
                for rows in sizes:
                    starts = [one[: CLIP_SAMPLES + SAMPLE_RATE] for one in waveforms[:rows]]
                    for model in self.models.values():
                        model.transcribe(RecordingBatch(starts, language, method, size))
                self.warm.add(shape)
            given = RecordingBatch(waveforms, language, method, size)

            def decode(model: Model, given: RecordingBatch = given) -> list[Output] | None:
                texts = model.transcribe(given)
                return None if texts is None else [Output(text=text) for text in texts]

            windows = sum(max(1, round(clip.seconds / step)) for clip in batch)
            self.decode(part, number, batch, decode, shape, windows)

    def batches(
        self, clips: Iterable[ReferenceClip], title: str
    ) -> Iterator[tuple[int, list[ReferenceClip]]]:
        """Numbered batches of one language, read ahead in a thread, with a progress bar."""
        batches = batches_by(lambda clip: clip.language, clips, self.job.config.batch_size)
        return iter(tqdm(prefetch(enumerate(batches), 2), title, unit="batch"))

    def decode(
        self,
        part: Part,
        number: int,
        batch: Sequence[ReferenceClip],
        decode: Callable[[Model], list[Output] | None],
        shape: tuple,
        windows: int,
    ) -> None:
        """Decode one batch with every model that can, and add its results.

        A model's time is the median of `config.passes`; a batch of a new shape is decoded once
        before it is timed, to exclude compilation. The first model changes from batch to batch, so
        that a machine that slows down slows all.
        """
        names = list(self.models)
        order = names[number % len(names) :] + names[: number % len(names)]
        outputs: dict[str, list[Output] | None] = {}
        times: dict[str, list[float]] = {name: [] for name in order}
        for turn in range(self.job.config.passes + (shape not in self.warm)):
            for name in order:
                begun = time.perf_counter()
                outputs[name] = decode(self.models[name])
                if turn or shape in self.warm:
                    times[name].append(time.perf_counter() - begun)
        self.warm.add(shape)
        able = {name: some for name in names if (some := outputs[name]) is not None}
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
            for name, some in able.items()
            for clip, output in zip(batch, some, strict=True)
        ]
        taken = BatchTime(
            **part._asdict(),
            clips=len(batch),
            audio_seconds=sum(clip.seconds for clip in batch),
            windows=windows,
            seconds={name: median(times[name]) for name in able},
        )
        self.results.add(clips, taken)

    def latency(self, folder: Path | None) -> list[Latency]:
        """Speed and memory on the first clips of one language, measured on the first host."""
        config = self.job.config
        if not config.latency or not is_main_host():
            return []
        clips = (clip for one in self.job.sets for clip in self.usable(one, every=True))
        some = list(itertools.islice(clips, max(config.latency)))
        some = [clip for clip in some if clip.language == some[0].language]
        return measure_latency(config, self.job.sources, some, folder) if some else []


def unsupported(models: Mapping[str, Model], language: str) -> str | None:
    """Which model does not support a language, and why; None where all do."""
    reasons = ((name, model.unsupported(language)) for name, model in models.items())
    return next((f"{name}: {reason}" for name, reason in reasons if reason), None)
