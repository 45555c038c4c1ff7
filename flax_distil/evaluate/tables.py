"""The tables of a report, from the results of all clips and batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Literal

import numpy as np

from flax_distil.config import EvaluateConfig
from flax_distil.evaluate.latency import Latency
from flax_distil.evaluate.results import BatchTime, ClipResult, Part, Results
from flax_distil.evaluate.scores import (
    Difference,
    Errors,
    Interval,
    area_under_curve,
    clip_errors,
    estimates,
    repeated_ngrams,
    without_silence,
)
from flax_distil.text.wer import ErrorCounts, ErrorRate, error_rate

Cell = str | int | float | Interval | Difference | None


@dataclass(frozen=True)
class Column:
    """A column of a table. format: of its numbers; "" for text."""

    title: str
    format: str = "{:.1f}"

    def text(self, cell: Cell) -> str:
        """A cell as it is printed: a value, with its interval, and its p-value."""
        if cell is None:
            return "–"
        if isinstance(cell, str):
            return cell
        if not isinstance(cell, Interval | Difference):
            return self.format.format(cell)
        sign = "+" if isinstance(cell, Difference) and cell.value > 0 else ""
        value = sign + self.format.format(cell.value)
        if cell.low is None or cell.high is None:
            return value
        value += f" ({self.format.format(cell.low)} to {self.format.format(cell.high)})"
        return f"{value}, p {cell.p:.3f}" if isinstance(cell, Difference) else value


@dataclass(frozen=True)
class ReportTable:
    """A table of a report."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def texts(self) -> list[list[str]]:
        """The cells as they are printed."""
        return [
            [column.text(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Scored:
    """All models on one part of the evaluation: clips by model, in one order."""

    part: Part
    clips: Mapping[str, Sequence[ClipResult]]
    batches: Sequence[BatchTime]
    unit: Literal["auto", "wer", "cer"]
    group: str | None = None
    reference: bool = False

    def rate(self, clip: ClipResult) -> ErrorRate:
        """The error rate of a clip's language."""
        return error_rate(clip.language, self.unit)

    @cached_property
    def counts(self) -> dict[str, list[ErrorCounts]]:
        """Errors by model and clip."""
        return {
            model: [self.rate(one).count([one.reference], [one.text]) for one in clips]
            for model, clips in self.clips.items()
        }

    @cached_property
    def errors(self) -> Errors:
        """Errors as the bootstrap takes them."""
        first = next(iter(self.clips.values()))
        return clip_errors(list(self.counts.values()), [clip.speaker for clip in first])

    def total(self, model: str) -> ErrorCounts:
        """Errors of one model over all clips."""
        return sum(self.counts[model], ErrorCounts())

    def characters(self, model: str) -> ErrorCounts:
        """As `total`, in characters."""
        clips = self.clips[model]
        pairs = (([one.reference], [one.text]) for one in clips)
        rates = (error_rate(one.language, "cer") for one in clips)
        return sum(
            (rate.count(*pair) for rate, pair in zip(rates, pairs, strict=True)), ErrorCounts()
        )

    @property
    def units(self) -> str:
        """WER, CER, or WER/CER for clips of both."""
        names = {self.rate(one).unit for clips in self.clips.values() for one in clips}
        return "/".join(sorted(names, reverse=True))

    def seconds(self, model: str) -> float:
        """Processing time."""
        return sum(one.seconds[model] for one in self.batches if model in one.seconds)

    @property
    def audio_seconds(self) -> float:
        """Length of all clips."""
        return sum(one.audio_seconds for one in self.batches)

    def repeated(self, model: str) -> int:
        """Repeated 5-grams of the normalised texts (the paper's 5-Dup.)."""
        return repeated_ngrams([self.rate(one).normalize(one.text) for one in self.clips[model]])


@dataclass
class Scores:
    """What tables are made of."""

    config: EvaluateConfig
    models: dict[str, int]
    """Parameters by name."""
    parts: list[Scored]
    latency: Sequence[Latency] = ()

    @classmethod
    def of(
        cls,
        config: EvaluateConfig,
        models: dict[str, int],
        results: Results,
        sets: Mapping[str, tuple[str | None, bool]],
        latency: Sequence[Latency],
    ) -> "Scores":
        """Scores of all parts. sets: group of each dataset, and whether it is the reference."""
        clips: dict[Part, dict[str, list[ClipResult]]] = {}
        for one in results.clips:
            clips.setdefault(one.part, {}).setdefault(one.model, []).append(one)
        times: dict[Part, list[BatchTime]] = {}
        for batch in results.batches:
            times.setdefault(batch.part, []).append(batch)
        parts = [
            Scored(
                part, some, times[part], config.error_rate, *sets.get(part.dataset, (None, False))
            )
            for part, some in clips.items()
        ]
        return cls(config, models, parts, latency)

    def of_test(self, test: str, setting: str | None = None) -> list[Scored]:
        """The parts of one test, of one setting or all."""
        return [
            one
            for one in self.parts
            if one.part.test == test and setting in (None, one.part.setting)
        ]

    def settings(self, test: str) -> list[str]:
        """The settings of a test, in order."""
        return list(dict.fromkeys(one.part.setting for one in self.of_test(test)))

    def averages(self, parts: Sequence[Scored]) -> dict[str, tuple[Cell, Cell]]:
        """Of each model that has all parts: macro-average and difference from the first model."""
        names = [name for name in self.models if parts and all(name in one.clips for one in parts)]
        if not names:
            return {}
        errors = [
            clip_errors(
                [one.counts[name] for name in names],
                [clip.speaker for clip in one.clips[names[0]]],
            )
            for one in parts
        ]
        scores = estimates(errors, self.config.resamples, self.config.seed)
        return dict(zip(names, scores, strict=True))

    def average(self, parts: Sequence[Scored], model: str) -> float | None:
        """Macro-average error rate in percent."""
        if not parts or any(model not in one.clips for one in parts):
            return None
        return float(np.mean([100 * one.total(model).rate for one in parts]))

    def relative_speed(self, model: str, test: str = "short") -> float | None:
        """Median over batches of the first model's time over this one's."""
        first = next(iter(self.models))
        pairs = [
            one.seconds[first] / one.seconds[model]
            for part in self.of_test(test)
            for one in part.batches
            if model in one.seconds
        ]
        return median(pairs) if pairs else None

    def rtf(self, model: str, test: str = "short") -> float | None:
        """Processing time over audio time."""
        parts = [one for one in self.of_test(test) if model in one.clips]
        audio = sum(one.audio_seconds for one in parts)
        return sum(one.seconds(model) for one in parts) / audio if parts else None

    def same_language(self, model: str) -> float | None:
        """Percent of the clips whose detected language is the dataset's; None for English-only."""
        clips = [clip for one in self.of_test("short") for clip in one.clips.get(model, ())]
        known = [one.detected == one.language for one in clips if one.detected is not None]
        return 100 * float(np.mean(known)) if known else None


def all_tables(scores: Scores) -> list[ReportTable]:
    """The tables of all tests that were run."""
    made = [
        summary(scores),
        by_dataset(scores),
        by_group(scores),
        long_form(scores),
        non_speech(scores),
        noise(scores),
        prompts(scores),
        latency(scores),
    ]
    return [one for one in made if one.rows]


def summary(scores: Scores) -> ReportTable:
    """A row a model: parameters, error rates with intervals, language identification, speed."""
    short, long = scores.of_test("short"), scores.settings("long")
    columns = [Column("model", ""), Column("parameters, M")]
    if short:
        columns += [Column(f"{rate_names(short)} %"), Column("difference")]
    columns += [Column(f"long, {setting}") for setting in long]
    columns += [Column("language %"), Column("RTF", "{:.3f}"), Column("speed", "{:.2f}×")]
    averages = {None: scores.averages(short)}
    averages |= {name: scores.averages(scores.of_test("long", name)) for name in long}
    rows = []
    for number, (model, parameters) in enumerate(scores.models.items()):
        row: list[Cell] = [model, parameters / 1e6]
        if short:
            rate, apart = averages[None][model]
            row += [rate, apart if number else None]
        row += [averages[name].get(model, (None, None))[0] for name in long]
        test = "short" if short else "long"
        row += [scores.same_language(model), scores.rtf(model, test)]
        rows.append((*row, scores.relative_speed(model, test)))
    note = (
        "Error rates are macro-averages over the datasets, after Whisper's normaliser, with 95 % "
        "confidence intervals of a bootstrap over clips (speakers, where ten or more are known), "
        "from five clips on; the difference is paired. RTF is processing time over audio time, "
        "without loading and compilation; speed is relative to the first model, the median over "
        "batches that all models decoded in turn. Language: clips whose detected language is the "
        "dataset's."
    )
    return table("summary", "Summary", columns, rows, note)


def by_dataset(scores: Scores) -> ReportTable:
    """Short clips: a row a dataset and model."""
    parts, with_cer = scores.of_test("short"), scores.config.character_errors
    columns = [Column("dataset", ""), Column("model", ""), Column("clips", "{}")]
    columns += [Column(f"{rate_names(parts)} %"), Column("sub"), Column("del"), Column("ins")]
    columns += [Column("CER %")] * with_cer + [Column("RTF", "{:.3f}")]
    rows = []
    for part in parts:
        averages = scores.averages([part])
        for model in part.clips:
            counts = part.total(model)
            row: list[Cell] = [dataset_name(part, parts), model, len(part.clips[model])]
            row += [averages[model][0], *error_parts(counts)]
            row += [100 * part.characters(model).rate] * with_cer
            rows.append((*row, part.seconds(model) / part.audio_seconds))
    return table("datasets", "Short clips", columns, rows)


def by_group(scores: Scores) -> ReportTable:
    """Short clips: macro-averages of groups, and effective robustness."""
    parts = scores.of_test("short")
    groups = list(dict.fromkeys(one.group for one in parts if one.group))
    reference = [one for one in parts if one.reference]
    others = [one for one in parts if not one.reference]
    columns = [Column("model", ""), *(Column(f"{name} %") for name in groups)]
    columns += [Column("reference %"), Column("others %"), Column("gap")] if reference else []
    averages = [scores.averages([one for one in parts if one.group == name]) for name in groups]
    rows = []
    for model in scores.models if groups or reference else ():
        row: list[Cell] = [model, *(one[model][0] for one in averages)]
        if reference:
            near, far = scores.average(reference, model), scores.average(others, model)
            row += [near, far, None if near is None or far is None else far - near]
        rows.append(tuple(row))
    note = "The gap is effective robustness: the other datasets' mean over the reference's."
    return table("groups", "Groups of datasets", columns, rows, note if reference else "")


def long_form(scores: Scores) -> ReportTable:
    """Recordings: a row a dataset, method and model (paper table 5)."""
    parts = scores.of_test("long")
    columns = [Column("dataset", ""), Column("method", ""), Column("model", "")]
    columns += [Column("recordings", "{}"), Column(f"{rate_names(parts)} %"), Column("IER")]
    columns += [
        Column("SER"),
        Column("DER"),
        Column("5-Dup.", "{}"),
        Column("ms a window", "{:.0f}"),
    ]
    columns += [Column("RTF", "{:.3f}")]
    rows = []
    for part in parts:
        averages, windows = scores.averages([part]), sum(one.windows for one in part.batches)
        for model in part.clips:
            substitutions, deletions, insertions = error_parts(part.total(model))
            row: list[Cell] = [dataset_name(part, parts), part.part.setting, model]
            row += [len(part.clips[model]), averages[model][0], insertions, substitutions]
            row += [deletions, part.repeated(model), 1000 * part.seconds(model) / windows]
            rows.append((*row, part.seconds(model) / part.audio_seconds))
    note = (
        "Insertions (IER), substitutions (SER) and deletions (DER) in percent of the reference; "
        "5-Dup.: 5-grams of a dataset's texts that occurred before."
    )
    return table("long", "Long recordings", columns, rows, note)


def non_speech(scores: Scores) -> ReportTable:
    """Clips without speech: how often and how much text they get."""
    speech = scores.of_test("short")
    columns = [Column("dataset", ""), Column("model", ""), Column("clips", "{}")]
    columns += [Column("with text %"), Column("words a minute"), Column("with text, rule %")]
    columns += [Column("no-speech AUC", "{:.3f}")]
    rows = []
    for part in scores.of_test("non-speech"):
        for model, clips in part.clips.items():
            words = sum(len(one.text.split()) for one in clips)
            minutes = sum(one.seconds for one in clips) / 60
            silent = known(one.no_speech_probability for one in clips)
            spoken = known(
                one.no_speech_probability for some in speech for one in some.clips.get(model, ())
            )
            row: list[Cell] = [part.part.dataset, model, len(clips)]
            row += [share(clips, lambda one: bool(one.text)), words / minutes]
            row += [share(clips, lambda one: bool(without_silence(one)))]
            rows.append((*row, area_under_curve(silent, spoken) if silent and spoken else None))
    note = (
        "Rule: Whisper's for long audio, by which a window is silent if its no-speech probability "
        "is over 0.6 and its mean log-probability below -1. AUC: how well the no-speech "
        "probability tells these clips from the short clips with speech (0.5 is chance)."
    )
    return table("non-speech", "Without speech", columns, rows, note)


def noise(scores: Scores) -> ReportTable:
    """Error rates under noise: a row a kind and model, a column a signal-to-noise ratio."""
    settings = [name.rsplit(", ", 1) for name in scores.settings("noise")]
    kinds, levels = (
        ([*dict.fromkeys(column)] for column in zip(*settings, strict=True))
        if settings
        else ((), ())
    )
    columns = [Column("noise", ""), Column("model", ""), *map(Column, levels)]
    rows = [
        (
            kind,
            model,
            *(
                scores.average(scores.of_test("noise", f"{kind}, {level}"), model)
                for level in levels
            ),
        )
        for kind in kinds
        for model in scores.models
    ]
    note = "Error rate in percent, macro-average over the datasets; level from each clip's power."
    return table("noise", "Added noise", columns, rows, note)


def prompts(scores: Scores) -> ReportTable:
    """Error rates with other text before the clip as a prompt."""
    settings = scores.settings("prompt")
    columns = [Column("prompt", ""), Column("model", ""), Column("error rate %")]
    columns += [Column("without a prompt %"), Column("5-Dup.", "{}"), Column("not ended %")]
    rows = []
    for setting in settings:
        parts = scores.of_test("prompt", setting)
        for model in scores.models:
            clips = [clip for one in parts for clip in one.clips[model]]
            ended = [one for one in clips if one.ended is not None]
            row: list[Cell] = [setting, model, scores.average(parts, model)]
            row += [scores.average(scores.of_test("short"), model)]
            row += [sum(one.repeated(model) for one in parts)]
            rows.append((*row, share(ended, lambda one: not one.ended) if ended else None))
    note = "Texts of the dataset's other clips; models that were trained without prompts may loop."
    return table("prompts", "Text before the clip", columns, rows, note)


def latency(scores: Scores) -> ReportTable:
    """Speed and memory at fixed batch sizes; texts of an assisted model are compared."""
    columns = [Column("batch", "{}"), Column("model", ""), Column("ms a batch", "{:.0f}")]
    columns += [Column("relative", "{:.2f}×"), Column("RTF", "{:.3f}"), Column("tokens/s")]
    columns += [Column("first call, s"), Column("peak memory, MiB", "{:.0f}")]
    columns += [Column("accepted %", "{:.0f}"), Column("texts of the first", "")]
    rows = []
    first = next(iter(scores.models))
    base = {one.batch: one for one in scores.latency if one.model == first}
    for one in sorted(scores.latency, key=lambda one: one.batch):
        same = sum(a == b for a, b in zip(one.texts, base[one.batch].texts, strict=True))
        row: list[Cell] = [one.batch, one.model, 1000 * one.seconds]
        row += [base[one.batch].seconds / one.seconds, one.seconds / one.audio_seconds]
        row += [one.tokens / one.seconds if one.tokens is not None else None, one.first_seconds]
        row += [None if one.peak_bytes is None else one.peak_bytes / 2**20]
        row += [None if one.acceptance is None else 100 * one.acceptance]
        rows.append((*row, f"{same} of {one.batch} equal"))
    note = (
        "Each model alone, medians of 5 batches after the first call, which compiles or takes the "
        "program from the cache; memory is the process's on a CPU, with its libraries."
    )
    return table("latency", "Speed and memory", columns, rows, note)


def table(
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Iterable[tuple[Cell, ...]],
    note: str = "",
) -> ReportTable:
    """A table without the columns in which no row has a value."""
    kept = [*rows]
    filled = [any(row[n] is not None for row in kept) for n in range(len(columns))]
    return ReportTable(
        name,
        title,
        tuple(column for column, some in zip(columns, filled, strict=True) if some),
        tuple(tuple(cell for cell, some in zip(row, filled, strict=True) if some) for row in kept),
        note,
    )


def rate_names(parts: Sequence[Scored]) -> str:
    """WER, CER or WER/CER: the units of the parts' error rates."""
    names = {name for one in parts for name in one.units.split("/")}
    return "/".join(sorted(names, reverse=True)) or "WER"


def dataset_name(part: Scored, parts: Sequence[Scored]) -> str:
    """The dataset's name, with its unit where others have another."""
    return part.part.dataset + (f" ({part.units})" if part.units != rate_names(parts) else "")


def error_parts(counts: ErrorCounts) -> tuple[float, float, float]:
    """Substitutions, deletions and insertions in percent of the reference."""
    size = max(counts.reference_words, 1) / 100
    return counts.substitutions / size, counts.deletions / size, counts.insertions / size


def share(clips: Sequence[ClipResult], condition: Callable[[ClipResult], bool]) -> float:
    """Percent of the clips for which a condition holds."""
    return 100 * float(np.mean([condition(one) for one in clips]))


def known(values: Iterable[Any]) -> list[Any]:
    """The values that are not None."""
    return [value for value in values if value is not None]
