"""Silence in a recording, and text that does not belong there.

Two rules: no segment begins or ends in digital silence (Whisper may put both anywhere in a pause),
and text between pauses that looks unlike speech is dropped (openai-whisper's
`hallucination_silence_threshold`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.model.dims import CHUNK_SECONDS
from flax_distil.transcribe.result import Segment, Transcript, Word
from flax_distil.transcribe.words import APPENDED, PREPENDED

BLOCK = SAMPLE_RATE // 100  # samples that are silent or not together: 10 ms

IMPROBABLE = 0.15  # a word's probability below which it is anomalous
SHORT, LONG = 0.133, 2.0  # seconds of a word beyond which it is anomalous
SHORT_WEIGHT = 15.0  # anomaly of each second that a word is too short
SCORED = 8  # words of a segment that are scored
ANOMALOUS = 3.0  # anomaly of a hallucinated segment; a shorter one needs that of its words alone
EDGE = 2.0  # seconds at a window's edges that count as silence


def digital_silence(
    waveform: Float32[np.ndarray, "n"], seconds: float
) -> list[tuple[float, float]]:
    """Start and end in seconds of each stretch of zeros of at least `seconds`."""
    blocks = waveform[: waveform.size // BLOCK * BLOCK].reshape(-1, BLOCK)
    silent = np.concatenate([[False], ~blocks.any(axis=1), [False]])
    edges = np.flatnonzero(silent[1:] != silent[:-1]).reshape(-1, 2) * (BLOCK / SAMPLE_RATE)
    return [(start, end) for start, end in edges.tolist() if end - start >= seconds]


def trim_silence(transcript: Transcript, gaps: Sequence[tuple[float, float]]) -> Transcript:
    """The transcript with segments that begin after a gap and end before one.

    Segments inside a gap, and those whose words have times, stay as they are.
    """
    segments = tuple(_clear(one, gaps) for one in transcript.segments)
    return replace(transcript, segments=segments)


def _clear(segment: Segment, gaps: Sequence[tuple[float, float]]) -> Segment:
    start, end = segment.start, segment.end
    if segment.words:
        return segment
    for first, last in gaps:
        if first <= start < last < segment.end:
            start = last
        if segment.start < first < end <= last:
            end = first
    return replace(segment, start=round(start, 2), end=round(end, 2))


def drop_hallucinations(
    segments: Sequence[Segment],
    threshold: float,
    start: float,
    end: float,
    recording_end: float,
    last_speech: float,
) -> tuple[list[Segment], float | None, bool]:
    """(segments that are kept, seconds at which to resume where that changes, whether it is done).

    A window that begins with a pause and then with an anomalous segment is not done: the next
    window begins after the pause and may recognise it better.

    segments: of one window, with words. threshold: seconds of silence that are worth skipping.
    start, end: seconds of the window. last_speech: when the last word before it ended.
    """
    spoken = [(place, one) for place, one in enumerate(segments) if one.words]
    if spoken and is_anomalous(first := spoken[0][1]) and first.start - start > threshold:
        return [], first.start, False
    for index, (place, segment) in enumerate(spoken):
        following = spoken[index + 1][1] if index + 1 < len(spoken) else None
        if is_anomalous(segment):
            silent_before = (
                segment.start - last_speech > threshold
                or segment.start < threshold
                or segment.start - start < EDGE
            )
            next_word = following.words[0].start if following and following.words else end
            silent_after = (
                next_word - segment.end > threshold
                or (following is not None and is_anomalous(following))
                or start + CHUNK_SECONDS - segment.end < EDGE
            )
            if silent_before and silent_after:
                last = recording_end - segment.end < threshold
                resume = recording_end if last else max(start + 1, segment.start)
                return list(segments[:place]), resume, True
        last_speech = segment.end
    return list(segments), None, True


def is_anomalous(segment: Segment) -> bool:
    """Whether a segment's first words are too improbable, too short or too long for speech."""
    words = [one for one in segment.words or () if one.word not in PREPENDED + APPENDED][:SCORED]
    score = sum(map(anomaly, words))
    return score >= ANOMALOUS or score + 0.01 >= len(words)


def anomaly(word: Word) -> float:
    """0 for a usual word; 1 and more for one that is hardly speech."""
    seconds = word.end - word.start
    improbable = float(word.probability < IMPROBABLE)
    return improbable + max(SHORT - seconds, 0) * SHORT_WEIGHT + max(seconds - LONG, 0)
