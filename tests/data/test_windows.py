"""Clips in order, padded, and what is left out."""

import threading
import time

import numpy as np
import pytest

from flax_distil.audio.load import CLIP_SAMPLES, AudioError, to_int16
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import Clip, hear, in_order, window_batches


def test_in_order_keeps_the_order_and_runs_ahead():
    started = []

    def slow_first(number):
        started.append(number)
        time.sleep(0.05 if number == 0 else 0.0)
        return number

    results = in_order(slow_first, range(20), workers=4, ahead=5)
    assert next(results) == 0
    assert 2 <= len(started) <= 7  # ahead of the consumer, and not further
    assert list(results) == list(range(1, 20))


def test_in_order_stops_its_threads_when_left_early():
    results = in_order(lambda number: number, range(100), workers=2, ahead=5)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if "loader" in thread.name]


def test_thirty_seconds_are_kept_and_more_is_not(tone):
    def heard(samples: int) -> Clip | Skipped:
        return hear(Utterance("a", np.zeros(samples, np.float32)))

    assert heard(CLIP_SAMPLES).duration == 30.0  # type: ignore[union-attr]
    # A resampler's surplus is cut off; what is really longer is not touched.
    assert heard(CLIP_SAMPLES + 160).duration == 30.0  # type: ignore[union-attr]
    assert heard(CLIP_SAMPLES + 161) == Skipped("a", "too long: 30.01 s, a window has 30 s")


def test_windows(tone, flac):
    utterances = [
        Utterance(str(n), tone(0.1 * (n + 1)) if n % 2 else flac(0.1 * (n + 1))) for n in range(5)
    ]
    batches = list(window_batches(utterances, batch_size=2))
    assert [batch.waveforms.shape for batch in batches] == [(2, CLIP_SAMPLES)] * 3
    assert [batch.valid.tolist() for batch in batches] == [[True] * 2, [True] * 2, [True, False]]
    assert [u.id for batch in batches for u in batch.utterances] == list("01234")
    for n in range(5):
        samples, row = to_int16(tone(0.1 * (n + 1))), batches[n // 2].waveforms[n % 2]
        assert np.array_equal(row[: len(samples)], samples)
        assert not row[len(samples) :].any()
    assert np.array_equal(batches[2].waveforms[1], batches[2].waveforms[0])


def test_a_corrupt_clip_among_good_ones(tone, flac, tmp_path):
    utterances = [
        Utterance("good", tone(0.1)),
        Utterance("noise", b"this is no audio"),
        Utterance("absent", str(tmp_path / "absent.wav")),
        Utterance("empty", b""),
        Utterance("klingon", tone(0.1), language="klingon"),
        Utterance("good too", flac(0.2)),
    ]
    skipped: list[Skipped] = []
    batches = list(window_batches(utterances, batch_size=4, skipped=skipped.append))
    assert [u.id for batch in batches for u in batch.utterances] == ["good", "good too"]
    assert [clip.id for clip in skipped] == ["noise", "absent", "empty", "klingon"]
    assert "no such audio file" in skipped[1].reason
    with pytest.raises(AudioError, match=r"^noise: "):
        list(window_batches(utterances, batch_size=4))
