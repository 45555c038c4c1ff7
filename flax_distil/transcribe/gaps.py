"""Segments kept out of digital silence: Whisper lets a text begin and end anywhere in a pause, so
that a subtitle would show seconds before its sound where a recording starts late or has a gap.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.transcribe.result import Segment, Transcript

BLOCK = SAMPLE_RATE // 100  # samples that are silent or not together: 10 ms


def digital_silence(
    waveform: Float32[np.ndarray, "n"], seconds: float
) -> list[tuple[float, float]]:
    """From and to of each stretch of zeros that is at least so long, in seconds."""
    blocks = waveform[: waveform.size // BLOCK * BLOCK].reshape(-1, BLOCK)
    silent = np.concatenate([[False], ~blocks.any(axis=1), [False]])
    edges = np.flatnonzero(silent[1:] != silent[:-1]).reshape(-1, 2) * (BLOCK / SAMPLE_RATE)
    return [(start, end) for start, end in edges.tolist() if end - start >= seconds]


def clear_of(transcript: Transcript, gaps: Sequence[tuple[float, float]]) -> Transcript:
    """The transcript with segments that begin behind a gap and end before one.

    One that lies in a gap whole, or whose words have times, stays as it is.
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
