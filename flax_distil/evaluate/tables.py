"""The tables of a report: a row is a dictionary of raw numbers, a column says how they look."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flax_distil.evaluate.latency import Latency
from flax_distil.evaluate.results import ClipResult
from flax_distil.evaluate.scores import (
    Difference,
    Interval,
    Scored,
    Scores,
    agreement,
    area_under_curve,
    without_silence,
)
from flax_distil.text.wer import ErrorCounts

Cell = str | int | float | Interval | Difference | None
Row = Mapping[str, Cell]

WHOLE = ("clips", "recordings", "5-Dup.", "batch")
ROUNDED = ("ms a window", "ms a batch", "peak memory, MiB", "accepted %")
# Formats of the columns whose numbers have other than one decimal.
FORMATS: dict[str, str] = dict.fromkeys(WHOLE, "{}")
FORMATS |= dict.fromkeys(ROUNDED, "{:.0f}")
FORMATS |= dict.fromkeys(("RTF", "no-speech AUC"), "{:.3f}")
FORMATS |= dict.fromkeys(("speed", "relative"), "{:.2f}×")
FORMATS |= dict.fromkeys(("Δ no-speech, speech", "Δ no-speech, non-speech"), "{:.2f}")


@dataclass(frozen=True)
class Column:
    """A column of a table. format: of its numbers; "" for text."""

    title: str
    format: str = "{:.1f}"

    def value(self, cell: Cell) -> str:
        """A cell without its interval."""
        if cell is None or isinstance(cell, str):
            return "–" if cell is None else cell
        sign = "+" if isinstance(cell, Difference) and cell.value > 0 else ""
        value = cell.value if isinstance(cell, Interval | Difference) else cell
        return sign + self.format.format(value)

    def interval(self, cell: Cell) -> str:
        """A cell's interval, and its p-value; "" where it has none."""
        if not isinstance(cell, Interval | Difference) or cell.low is None or cell.high is None:
            return ""
        ends = f"{self.format.format(cell.low)} to {self.format.format(cell.high)}"
        return f"{ends}, p {cell.p:.3f}" if isinstance(cell, Difference) else ends

    def text(self, cell: Cell) -> str:
        """A cell as it is printed: a value with its interval and its p-value."""
        interval = self.interval(cell)
        return f"{self.value(cell)} ({interval})" if interval else self.value(cell)


@dataclass(frozen=True)
class ReportTable:
    """A table of a report; rows have a cell for every column's title."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def keys(self) -> int:
        """Number of the first columns, which name a row: up to the model's name."""
        titles = [column.title for column in self.columns]
        return titles.index("model") + 1 if "model" in titles else 1

    def texts(self) -> list[list[str]]:
        """The cells as they are printed."""
        return [[column.text(row[column.title]) for column in self.columns] for row in self.rows]


def table(name: str, title: str, rows: Sequence[Row], note: str = "") -> ReportTable:
    """A table of these rows, without the columns in which no row has a value."""
    columns = []
    for heading in dict.fromkeys(heading for row in rows for heading in row):
        cells = [row[heading] for row in rows if row.get(heading) is not None]
        if cells:
            text = isinstance(cells[0], str)
            columns.append(Column(heading, "" if text else FORMATS.get(heading, "{:.1f}")))
    kept = tuple({one.title: row.get(one.title) for one in columns} for row in rows)
    return ReportTable(name, title, tuple(columns), kept, note)


def all_tables(scores: Scores, speeds: Sequence[Latency] = ()) -> list[ReportTable]:
    """The tables of all tests that were run."""
    makers = (summary, by_dataset, by_group, long_form, non_speech, noise, prompts, same_start)
    made = [make(scores) for make in makers]
    return [one for one in (*made, latency(speeds)) if one.rows]


def summary(scores: Scores) -> ReportTable:
    """A row a model: parameters, error rates with intervals, language identification, speed."""
    short, long, rows = scores.of_test("short"), scores.settings("long"), []
    averages = scores.averages(short)
    of_method = {name: scores.averages(scores.of_test("long", name)) for name in long}
    for number, (model, parameters) in enumerate(scores.models.items()):
        row: dict[str, Cell] = {"model": model, "parameters, M": parameters / 1e6}
        if short:
            rate, apart = averages[model]
            row |= {f"{rate_names(short)} %": rate, "difference": apart if number else None}
        for name, some in of_method.items():
            row[f"long, {name}"] = some[model][0] if model in some else None
        test = "short" if short else "long"
        row |= {"language %": scores.same_language(model), "RTF": scores.rtf(model, test)}
        rows.append(row | {"speed": scores.relative_speed(model, test)})
    note = (
        "Error rates are macro-averages over the datasets, after Whisper's normaliser, with 95 % "
        "confidence intervals of a bootstrap over clips (speakers, where ten or more are known), "
        "from five clips on; the difference from the first model is paired. RTF is processing "
        "time over audio time, without loading and compilation; speed is relative to the first "
        "model, the median over batches that all models decoded in turn."
    )
    if any(scores.same_language(model) is not None for model in scores.models):
        note += " Language: clips whose detected language is the dataset's."
    return table("summary", "Summary", rows, note)


def by_dataset(scores: Scores) -> ReportTable:
    """Short clips: a row a dataset and model."""
    parts, rows = scores.of_test("short"), []
    for part in parts:
        averages = scores.averages([part])
        for model, clips in part.clips.items():
            row: dict[str, Cell] = {"dataset": dataset_name(part, parts), "model": model}
            row |= {"clips": len(clips), f"{rate_names(parts)} %": averages[model][0]}
            row |= zip(("sub", "del", "ins"), error_parts(part.total(model)), strict=True)
            if scores.config.character_errors:
                row["CER %"] = 100 * part.characters(model).rate
            rows.append(row | {"RTF": part.seconds(model) / part.audio_seconds})
    note = "Substitutions, deletions and insertions are percent of the reference."
    return table("datasets", "Short clips", rows, note)


def by_group(scores: Scores) -> ReportTable:
    """Short clips: macro-averages of groups, and effective robustness."""
    parts = scores.of_test("short")
    groups: dict[str, list[Scored]] = {}
    for part in parts:
        if part.group:
            groups.setdefault(part.group, []).append(part)
    reference = [one for one in parts if one.reference]
    others = [one for one in parts if not one.reference]
    robust = bool(reference and others)
    averages = {name: scores.averages(some) for name, some in groups.items()}
    gaps, rows = scores.averages(others, less=reference) if robust else {}, []
    for number, model in enumerate(scores.models if groups or robust else ()):
        row: dict[str, Cell] = {"model": model}
        row |= {f"{name} %": some[model][0] for name, some in averages.items()}
        if robust:
            gap, apart = gaps[model]
            row |= {"reference %": scores.average(reference, model)}
            row |= {"others %": scores.average(others, model), "gap": gap}
            row |= {"gap difference": apart if number else None}
        rows.append(row)
    note = (
        "Effective robustness as in the Whisper paper (Radford et al., 2022, section 3.3): the "
        "gap is the error rate of the other datasets less that of the reference datasets, both "
        "macro-averages. A gap difference below 0 means that a model loses less than the first "
        "model does when it leaves the reference datasets. Taori et al. (2020) subtract a line "
        "fitted through many baseline models, which a comparison of a few models does not have."
    )
    return table("groups", "Groups of datasets", rows, note if robust else "")


def long_form(scores: Scores) -> ReportTable:
    """Recordings: a row a dataset, method and model (paper table 5)."""
    parts, rows = scores.of_test("long"), []
    for part in parts:
        averages, windows = scores.averages([part]), sum(one.windows for one in part.batches)
        for model, clips in part.clips.items():
            row: dict[str, Cell] = {"dataset": dataset_name(part, parts)}
            row |= {"method": part.part.setting, "model": model, "recordings": len(clips)}
            row[f"{rate_names(parts)} %"] = averages[model][0]
            substitutions, deletions, insertions = error_parts(part.total(model))
            row |= {"IER": insertions, "SER": substitutions, "DER": deletions}
            row |= {"5-Dup.": part.repeated(model)}
            row |= {"ms a window": 1000 * part.seconds(model) / windows}
            rows.append(row | {"RTF": part.seconds(model) / part.audio_seconds})
    note = (
        "Insertions (IER), substitutions (SER) and deletions (DER) are percent of the reference; "
        "5-Dup. is the number of 5-grams of a dataset's texts that occurred before."
    )
    return table("long", "Long recordings", rows, note)


def non_speech(scores: Scores) -> ReportTable:
    """Clips without speech: how often and how much text they get."""
    speech, rows = scores.of_test("short"), []
    for part in scores.of_test("non-speech"):
        for model, clips in part.clips.items():
            silent = known(clips)
            spoken = [p for some in speech for p in known(some.clips.get(model, ()))]
            words = sum(len(one.text.split()) for one in clips)
            row: dict[str, Cell] = {"dataset": part.part.dataset, "model": model}
            row |= {"clips": len(clips), "with text %": share(clips, lambda one: bool(one.text))}
            row["words a minute"] = words / (sum(one.seconds for one in clips) / 60)
            row["with text, rule %"] = share(clips, lambda one: bool(without_silence(one)))
            auc = area_under_curve(silent, spoken) if silent and spoken else None
            rows.append(row | {"no-speech AUC": auc})
    note = (
        "Rule: Whisper's for long audio, by which a window is silent if its no-speech probability "
        "is over 0.6 and its mean log-probability below -1. AUC: area under the ROC curve, how "
        "well the no-speech probability separates these clips from the short clips with speech "
        "(0.5 is chance)."
    )
    return table("non-speech", "Without speech", rows, note)


def noise(scores: Scores) -> ReportTable:
    """Error rates under noise: a row a kind and model, a column a signal-to-noise ratio."""
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for setting in scores.settings("noise"):
        kind, level = setting.rsplit(", ", 1)
        for model in scores.models:
            row = rows.setdefault((kind, model), {"noise": kind, "model": model})
            row[level] = scores.average(scores.of_test("noise", setting), model)
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    ordered = [row for kind in kinds for (one, _), row in rows.items() if one == kind]
    note = (
        "Error rate in percent, macro-average over the datasets. The signal-to-noise ratio is "
        "relative to each clip's own mean power."
    )
    return table("noise", "Added noise", ordered, note)


def prompts(scores: Scores) -> ReportTable:
    """Error rates with other text before the clip as a prompt."""
    rows = []
    for setting in scores.settings("prompt"):
        parts = scores.of_test("prompt", setting)
        for model in scores.models:
            clips = [clip for one in parts for clip in one.clips[model]]
            ended = [one for one in clips if one.ended is not None]
            row: dict[str, Cell] = {"prompt": setting, "model": model}
            row["error rate %"] = scores.average(parts, model)
            row["without a prompt %"] = scores.average(scores.of_test("short"), model)
            row["5-Dup."] = sum(one.repeated(model) for one in parts)
            row["not ended %"] = share(ended, lambda one: not one.ended) if ended else None
            rows.append(row)
    note = (
        "The prompt is text of the dataset's other clips. Not ended: texts that were cut at the "
        "longest length; models that were trained without prompts may loop."
    )
    return table("prompts", "Text before the clip", rows, note)


def same_start(scores: Scores) -> ReportTable:
    """Detected language and no-speech probability beside the first model's."""
    rows, (first, *others) = [], scores.models
    for model in others:
        row: dict[str, Cell] = {"model": model}
        for test, name in (("short", "speech"), ("non-speech", "non-speech")):
            parts = scores.of_test(test)
            pair = ([clip for one in parts for clip in one.clips[n]] for n in (first, model))
            language, no_speech = agreement(*pair)
            if test == "short":
                row["same language %"] = language
            row[f"Δ no-speech, {name}"] = no_speech
        if any(cell is not None for cell in list(row.values())[1:]):
            rows.append(row)
    note = (
        "Percent of the clips in which a model detects the same language as the first model, and "
        "the median difference of their no-speech probabilities on clips with and without speech."
    )
    return table("agreement", "Agreement with the first model", rows, note)


def latency(speeds: Sequence[Latency]) -> ReportTable:
    """Speed and memory at fixed batch sizes; texts of an assisted model are compared."""
    rows, base = [], {}
    for one in sorted(speeds, key=lambda one: one.batch):
        first = base.setdefault(one.batch, one)
        same = sum(a == b for a, b in zip(one.texts, first.texts, strict=True))
        row: dict[str, Cell] = {"batch": one.batch, "model": one.model}
        row |= {"ms a batch": 1000 * one.seconds, "relative": first.seconds / one.seconds}
        row |= {"RTF": one.seconds / one.audio_seconds}
        row["tokens/s"] = None if one.tokens is None else one.tokens / one.seconds
        row["first call, s"] = one.first_seconds
        row["peak memory, MiB"] = None if one.peak_bytes is None else one.peak_bytes / 2**20
        row["accepted %"] = None if one.acceptance is None else 100 * one.acceptance
        rows.append(row | {"texts of the first": f"{same} of {one.batch} equal"})
    note = (
        "Each model alone, medians of 5 batches after the first call, which compiles or takes the "
        "program from the cache; memory is the process's on a CPU, with its libraries. Accepted: "
        "share of the assistant's draft tokens."
    )
    return table("latency", "Speed and memory", rows, note)


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


def known(clips: Sequence[ClipResult]) -> list[float]:
    """The no-speech probabilities of the clips, where the library tells them."""
    values = (one.no_speech_probability for one in clips)
    return [value for value in values if value is not None]
