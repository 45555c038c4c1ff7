"""Segments do not reach into digital silence."""

import numpy as np

from flax_distil.transcription import Segment, Transcript, Word
from flax_distil.transcription.silence import digital_silence, trim_silence

RATE = 16_000


def test_stretches_of_zeros():
    """Sound from 4 to 6 s and from 9 to 9.5 s, with a short pause in it."""
    sound = np.zeros(10 * RATE, np.float32)
    sound[4 * RATE : 6 * RATE] = sound[9 * RATE : 9 * RATE + RATE // 2] = 0.1
    sound[5 * RATE : 5 * RATE + RATE // 2] = 0
    assert digital_silence(sound, 1.0) == [(0, 4), (6, 9)]
    assert digital_silence(sound, 0.5) == [(0, 4), (5, 5.5), (6, 9), (9.5, 10)]
    assert digital_silence(sound + np.float32(1e-5), 1.0) == []
    assert digital_silence(sound[:100], 1.0) == digital_silence(sound[:0], 1.0) == []


def segment(start: float, end: float, words=None) -> Segment:
    return Segment(0, 0, start, end, "a", (1,), 0, 0, 1, 0, words)


def test_segments_begin_behind_a_gap_and_end_before_one():
    gaps = [(0.0, 4.0), (6.0, 9.0)]
    given = [(0.0, 6.0), (3.98, 7.5), (0.0, 9.5), (4.5, 5.5), (9.0, 9.5), (6.5, 8.0), (5.0, 9.0)]
    wanted = [(4.0, 6.0), (4.0, 6.0), (4.0, 9.5), (4.5, 5.5), (9.0, 9.5), (6.5, 8.0), (5.0, 6.0)]
    found = trim_silence(Transcript("", tuple(segment(*one) for one in given), "en"), gaps)
    assert [(one.start, one.end) for one in found.segments] == wanted
    timed = Transcript("", (segment(0.0, 5.0, (Word("a", 0.0, 5.0, 1),)),), "en")
    assert trim_silence(timed, gaps) == timed
