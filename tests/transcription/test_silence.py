"""Text that is made up over silence: what is dropped, and where reading goes on."""

from dataclasses import replace

import pytest

from flax_distil.transcription.transcript import Segment, Word
from flax_distil.transcription.words import anomaly, drop_hallucinations, is_anomalous


def segment(start: float, end: float, probability: float = 0.9, count: int = 4) -> Segment:
    """`count` words that fill it."""
    step = (end - start) / count
    words = tuple(
        Word(" so", start + i * step, start + (i + 1) * step, probability) for i in range(count)
    )
    return Segment(0, 0, start, end, " so" * count, (1,) * count, 0, 0, 1, 0, words)


def test_odd_words():
    assert anomaly(Word(" a", 0, 0.5, 0.2)) == 0
    assert anomaly(Word(" a", 0, 0.5, 0.1)) == 1
    assert anomaly(Word(" a", 0, 0, 0.9)) == pytest.approx(0.133 * 15)
    assert anomaly(Word(" a", 0, 5, 0.1)) == pytest.approx(4)
    assert not is_anomalous(segment(0, 2))
    assert is_anomalous(segment(0, 2, probability=0.1))
    assert not is_anomalous(segment(0, 3, count=4))
    comma = Word(",", 0, 0, 0.01)  # punctuation is not judged
    assert not is_anomalous(replace(segment(0, 2), words=(*segment(0, 2).words, comma, comma)))


@pytest.mark.parametrize(
    ("segments", "window", "expected"),
    [
        ([segment(1, 3), segment(4, 6)], (0, 30, 100), (2, None, True)),
        # A pause, then an anomalous segment: the next window begins after the pause.
        ([segment(5, 6, 0.1), segment(7, 9)], (0, 30, 100), (0, 5, False)),
        # Anomalous between two pauses: it is decoded again, unless the recording ends there.
        ([segment(1, 3), segment(8, 9, 0.1)], (0, 30, 100), (1, 8, True)),
        ([segment(1, 3), segment(28, 29, 0.1)], (0, 30, 30), (1, 30, True)),
        ([segment(1, 3), segment(8, 9, 0.1), segment(12, 14)], (0, 30, 100), (1, 8, True)),
        ([segment(1, 3), segment(8, 9, 0.1), segment(9, 10, 0.1)], (0, 30, 100), (1, 8, True)),
        # Anomalous beside speech: it is kept.
        ([segment(5, 7), segment(7, 8, 0.1)], (0, 30, 100), (2, None, True)),
        ([segment(1, 3), segment(8, 9, 0.1), segment(9.5, 12)], (0, 30, 100), (3, None, True)),
        # At the window's edge; at least a second is passed over.
        ([segment(20, 20.5, 0.1)], (20, 50, 100), (0, 21, True)),
        ([replace(segment(8, 9, 0.1), words=())], (0, 30, 100), (1, None, True)),
        ([], (0, 30, 100), (0, None, True)),
    ],
)
def test_what_is_dropped(segments, window, expected):
    kept, go_on, is_read = drop_hallucinations(segments, 2.0, *window, last_speech=window[0])
    assert (len(kept), go_on, is_read) == expected
    assert kept == segments[: len(kept)]
