"""Error rates, their confidence intervals and other scores: pure functions of results.

Rates are percent. A confidence interval is the percentile interval of a bootstrap over clips, or
over speakers where every clip has one and there are ten or more; models are compared on the same
resampled clips (paired bootstrap; Bisani and Ney, ICASSP 2004).
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from flax_distil.evaluate.results import ClipResult
from flax_distil.text.wer import ErrorCounts

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
        clusters = int(one.clusters_N.max()) + 1
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
    datasets: Sequence[Errors], resamples: int, seed: int = 0
) -> list[tuple[Interval, Difference]]:
    """Of each model: its error rate, and the difference from the first model's.

    Without intervals for no resamples, or fewer than five clips or speakers of a dataset.
    """
    rates_M = macro_rate(datasets)
    apart_M = rates_M - rates_M[0]
    if not resamples or min(one.clusters_N.max() + 1 for one in datasets) < FEWEST_CLUSTERS:
        pairs = zip(rates_M.tolist(), apart_M.tolist(), strict=True)
        return [(Interval(rate), Difference(apart)) for rate, apart in pairs]
    samples_MR, scores = bootstrap(datasets, resamples, seed), []
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
