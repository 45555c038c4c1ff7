"""Error rates, their confidence intervals and other scores: pure functions of results.

Rates are percent. A confidence interval is the percentile interval of a bootstrap over clips, or
over speakers where every clip has one and there are ten or more; models are compared on the same
resampled clips (paired bootstrap; Bisani and Ney, ICASSP 2004).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from flax_distil.config import EvaluateConfig
from flax_distil.evaluate.results import BatchTime, ClipResult, Output, Part, Results
from flax_distil.text.wer import ErrorCounts, ErrorRate, error_rate

CONFIDENCE = 0.95
FEWEST_SPEAKERS = 10  # with fewer, clips are resampled, not speakers
FEWEST_CLUSTERS = 5  # with fewer, an interval would say nothing


class Interval(NamedTuple):
    """A value with its confidence interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Difference(NamedTuple):
    """A difference with its confidence interval and two-sided p-value against 0."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


class Errors(NamedTuple):
    """Errors of all models on the same clips of one dataset.

    errors_MN: models by clips. units_N: reference words or characters. clusters_N: number of each
    clip's speaker, or of the clip.
    """

    errors_MN: Int64[np.ndarray, "M N"]
    units_N: Int64[np.ndarray, "N"]
    clusters_N: Int64[np.ndarray, "N"]

    @property
    def clusters(self) -> int:
        """Number of clips, or of speakers."""
        return int(self.clusters_N.max()) + 1


def clip_errors(counts: Sequence[Sequence[ErrorCounts]], speakers: Sequence[str | None]) -> Errors:
    """Errors by clip. counts: of each model, of each clip. speakers: of each clip."""
    by_speaker = None not in speakers and len(set(speakers)) >= FEWEST_SPEAKERS
    names = speakers if by_speaker else [str(n) for n in range(len(speakers))]
    return Errors(
        np.array([[one.errors for one in row] for row in counts], np.int64),
        np.array([one.reference_words for one in counts[0]], np.int64),
        np.unique(np.array(names, str), return_inverse=True)[1].astype(np.int64),
    )


def bootstrap(
    datasets: Sequence[Errors], resamples: int, seed: int = 0
) -> Float64[np.ndarray, "M R"]:
    """Error rates in percent, averaged over the datasets, of each model in each resample."""
    rates = []
    for number, one in enumerate(datasets):
        clusters = one.clusters
        errors_MC = np.stack([np.bincount(one.clusters_N, row, clusters) for row in one.errors_MN])
        units_C = np.bincount(one.clusters_N, one.units_N, clusters)
        draw = np.random.default_rng((seed, number))
        rates_MR = np.empty((len(errors_MC), resamples))
        block = max(1, 2**24 // clusters)  # 128 MiB of weights at a time
        for start in range(0, resamples, block):
            rows = slice(start, min(start + block, resamples))
            weights_RC = draw.multinomial(
                clusters, np.full(clusters, 1 / clusters), rows.stop - rows.start
            )
            rates_MR[:, rows] = errors_MC @ weights_RC.T / np.maximum(weights_RC @ units_C, 1)
        rates.append(100 * rates_MR)
    return np.mean(rates, axis=0)


def macro_rate(datasets: Sequence[Errors]) -> Float64[np.ndarray, "M"]:
    """Error rates in percent, averaged over the datasets, of each model."""
    rates = [one.errors_MN.sum(axis=1) / max(one.units_N.sum(), 1) for one in datasets]
    return 100 * np.mean(rates, axis=0)


def interval(samples_R: Float64[np.ndarray, "R"]) -> tuple[float, float]:
    """The middle 95 % of a bootstrap's samples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples_R, [tail, 1 - tail])
    return float(low), float(high)


def estimates(
    datasets: Sequence[Errors], resamples: int, seed: int = 0, less: Sequence[Errors] = ()
) -> list[tuple[Interval, Difference]]:
    """Of each model: its error rate, and the difference from the first model's.

    Without intervals for no resamples, or fewer than five clips or speakers of a dataset.

    less: datasets whose error rate is subtracted.
    """
    rates_M, smallest = macro_rate(datasets), min(one.clusters for one in (*datasets, *less))
    if less:
        rates_M = rates_M - macro_rate(less)
    apart_M = rates_M - rates_M[0]
    if not resamples or smallest < FEWEST_CLUSTERS:
        pairs = zip(rates_M.tolist(), apart_M.tolist(), strict=True)
        return [(Interval(rate), Difference(apart)) for rate, apart in pairs]
    samples_MR, scores = bootstrap(datasets, resamples, seed), []
    if less:
        samples_MR = samples_MR - bootstrap(less, resamples, seed + 1)
    for rate, apart, samples_R in zip(rates_M.tolist(), apart_M.tolist(), samples_MR, strict=True):
        apart_R = samples_R - samples_MR[0]
        # The observed difference counts as one more sample, so that p is never 0.
        tails = (1 + np.sum(apart_R <= 0), 1 + np.sum(apart_R >= 0))
        p = min(1.0, 2 * float(min(tails)) / (resamples + 1))
        difference = Difference(apart, *interval(apart_R), p)
        scores.append((Interval(rate, *interval(samples_R)), difference))
    return scores


def repeated_ngrams(texts: Sequence[str], size: int = 5) -> int:
    """Word n-grams that occurred before in the texts, read in sequence: the paper's "5-Dup."."""
    words = " ".join(texts).split()
    ngrams = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    return ngrams.total() - len(ngrams)


def area_under_curve(
    positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray
) -> float:
    """Area under the ROC curve: how often a positive has a higher score than a negative; a tie
    counts half (Mann and Whitney)."""
    low = np.sort(np.asarray(negative))
    below = np.searchsorted(low, positive, "left")
    not_above = np.searchsorted(low, positive, "right")
    return float((below + not_above).sum() / 2 / (len(positive) * len(negative)))


def without_silence(clip: ClipResult, no_speech: float = 0.6, log_probability: float = -1.0) -> str:
    """The clip's text, or "" where Whisper's rule for long audio skips the window as silent."""
    if clip.no_speech_probability is None or clip.mean_log_probability is None:
        return clip.text
    silent = clip.no_speech_probability > no_speech
    return "" if silent and clip.mean_log_probability < log_probability else clip.text


class Agreement(NamedTuple):
    """How close two models are at the start of transcript, where the language and no-speech tokens
    are predicted. In training only the KL at `<|startoftranscript|>` reaches them.

    language: percent of the clips with the same likeliest language, of multilingual models.
    no_speech: median |difference| of the no-speech probability. None where a model does not tell.
    """

    language: float | None
    no_speech: float | None


def agreement(first: Sequence[Output], second: Sequence[Output]) -> Agreement:
    """The agreement of two models on the same clips."""
    pairs = list(zip(first, second, strict=True))
    same = [a.detected == b.detected for a, b in pairs if a.detected and b.detected]
    apart = [
        abs(a.no_speech_probability - b.no_speech_probability)
        for a, b in pairs
        if a.no_speech_probability is not None and b.no_speech_probability is not None
    ]
    return Agreement(
        100 * float(np.mean(same)) if same else None, float(np.median(apart)) if apart else None
    )


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

    def total(self, model: str) -> ErrorCounts:
        """Errors of one model over all clips."""
        return sum(self.counts[model], ErrorCounts())

    def characters(self, model: str) -> ErrorCounts:
        """As `total`, in characters."""
        counts = (
            error_rate(one.language, "cer").count([one.reference], [one.text])
            for one in self.clips[model]
        )
        return sum(counts, ErrorCounts())

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
    """What tables are made of. models: parameters by name. parts: all that were evaluated."""

    config: EvaluateConfig
    models: dict[str, int]
    parts: list[Scored]

    @classmethod
    def of(
        cls,
        config: EvaluateConfig,
        models: dict[str, int],
        results: Results,
        sets: Mapping[str, tuple[str | None, bool]],
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
        return cls(config, models, parts)

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

    def averages(
        self, parts: Sequence[Scored], less: Sequence[Scored] = ()
    ) -> dict[str, tuple[Interval, Difference]]:
        """Of each model that has all parts: macro-average and difference from the first model.

        less: parts whose macro-average is subtracted.
        """
        every = (*parts, *less)
        names = [name for name in self.models if parts and all(name in one.clips for one in every)]
        if not names:
            return {}
        errors = [
            clip_errors(
                [one.counts[name] for name in names],
                [clip.speaker for clip in one.clips[names[0]]],
            )
            for one in every
        ]
        size = len(parts)
        scores = estimates(
            errors[:size], self.config.resamples, self.config.seed, less=errors[size:]
        )
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
