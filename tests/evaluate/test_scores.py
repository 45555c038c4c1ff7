"""Scores against hand-computed values and SciPy."""

import numpy as np
import pytest
from scipy import stats

from flax_distil.evaluate.results import ClipResult
from flax_distil.evaluate.scores import (
    area_under_curve,
    clip_errors,
    estimates,
    macro_rate,
    repeated_ngrams,
    without_silence,
)
from flax_distil.text.wer import ErrorCounts


def counts(errors, units) -> list[ErrorCounts]:
    return [ErrorCounts(int(e), 0, 0, int(u)) for e, u in zip(errors, units, strict=True)]


@pytest.fixture
def two_models():
    """200 clips of 1 to 30 words; the second model has an error rate 3 points higher."""
    draw = np.random.default_rng(0)
    units = draw.integers(1, 30, 200)
    return clip_errors(
        [counts(draw.binomial(units, rate), units) for rate in (0.1, 0.13)], [None] * 200
    )


def test_intervals_are_scipys(two_models):
    """The percentile bootstrap with 20,000 resamples each: ends of intervals differ by chance."""
    (_, own), (rate, apart) = estimates([two_models], resamples=20_000)
    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 20_000}
    first, second = two_models.errors_MN
    for ours, errors in ((rate, second), (apart, second - first)):
        ratio = lambda e, u, axis=-1: 100 * e.sum(axis) / u.sum(axis)
        theirs = stats.bootstrap((errors, two_models.units_N), ratio, rng=1, **options)
        expected = (theirs.confidence_interval.low, theirs.confidence_interval.high)
        np.testing.assert_allclose(ours[1:3], expected, atol=0.1)
    assert (own.value, own.low, own.high, own.p) == (0, 0, 0, 1)


def test_the_p_value_of_equal_models_is_uniform_and_of_different_ones_small(two_models):
    assert estimates([two_models], resamples=2_000)[1][1].p < 0.02
    found, units = [], np.full(60, 10)
    for seed in range(60):
        draw = np.random.default_rng(seed)
        models = [counts(draw.binomial(units, 0.2), units) for _ in range(2)]
        found.append(estimates([clip_errors(models, [None] * 60)], 400, seed)[1][1].p)
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_clips_of_one_speaker_are_resampled_together():
    """Ten speakers who differ, with 30 clips each: as uncertain as ten numbers are."""
    rates, units = np.repeat(np.linspace(0.0, 0.4, 10), 30), np.full(300, 20)
    errors = counts(rates * units, units)
    speakers = [f"s{n // 30}" for n in range(300)]
    (alone,), (known,) = (
        estimates([clip_errors([errors], who)], 4_000) for who in ([None] * 300, speakers)
    )
    widths = [one.high - one.low for one, _ in (alone, known)]
    assert widths[1] > 4 * widths[0]
    spread = 2 * 1.96 * 100 * rates[::30].std() / np.sqrt(10)
    assert widths[1] == pytest.approx(spread, rel=0.1)


def test_few_clips_have_no_interval_and_few_speakers_are_not_resampled():
    """Thirty clips of one speaker are as uncertain as thirty clips; of four clips nothing is."""
    draw = np.random.default_rng(0)
    errors = counts(draw.binomial(20, 0.1, 30), np.full(30, 20))
    (one,), (none,) = (
        estimates([clip_errors([errors], speakers)], 500) for speakers in (["s"] * 30, [None] * 30)
    )
    assert one == none
    assert one[0].low < one[0].value < one[0].high
    ((rate, apart),) = estimates([clip_errors([errors[:4]], [None] * 4)], 500)
    assert (rate.low, rate.high, apart.p) == (None, None, None)


def test_the_mean_is_over_datasets_not_over_clips():
    small = clip_errors([counts([1], [10])], [None])
    large = clip_errors([counts([30] * 9, [100] * 9)], [None] * 9)
    assert macro_rate([small, large]).tolist() == [20.0]
    assert estimates([small, large], 100)[0][0].value == 20.0


def test_repeated_five_grams_by_hand():
    assert repeated_ngrams(["a b c d"]) == 0
    assert repeated_ngrams(["a b c d e a b c d e"]) == 1  # abcde again
    assert repeated_ngrams(["x x x x x x x"]) == 2
    assert repeated_ngrams(["a b c d e", "a b c d e f"]) == 1  # over the whole dataset
    assert repeated_ngrams([]) == 0


def test_area_under_curve_is_mann_and_whitneys():
    draw = np.random.default_rng(0)
    silent, spoken = draw.beta(4, 2, 30).round(1), draw.beta(2, 4, 50).round(1)  # with ties
    theirs = stats.mannwhitneyu(silent, spoken).statistic / (30 * 50)
    assert area_under_curve(silent, spoken) == pytest.approx(theirs)
    assert area_under_curve([1.0], [0.0]) == 1.0


@pytest.mark.parametrize(
    ("no_speech", "log_probability", "text"),
    [
        (0.7, -1.1, ""),
        (0.7, -0.9, "thank you"),
        (0.5, -2.0, "thank you"),
        (None, None, "thank you"),
    ],
)
def test_whispers_rule_for_silence(no_speech, log_probability, text):
    clip = ClipResult(
        text="thank you",
        test="non-speech",
        setting="",
        dataset="noise",
        id="1",
        speaker=None,
        model="m",
        language="en",
        seconds=3.0,
        reference="",
        no_speech_probability=no_speech,
        mean_log_probability=log_probability,
    )
    assert without_silence(clip) == text
