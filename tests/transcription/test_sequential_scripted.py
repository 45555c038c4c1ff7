"""The sequential algorithm's decisions against openai-whisper's, over scripted windows.

Models are replaced by a script, the same for both, that draws texts, times and probabilities for
each window: pauses, improbable words, silence and unfinished text come in all combinations.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import whisper

from flax_distil.decode.recognizer import AudioStates, Recognizer
from flax_distil.decode.search import Hypothesis, Window
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Spec
from flax_distil.options import DecodeOptions
from flax_distil.text.tokens import load_tokens
from flax_distil.transcription import SequentialOptions, Word, long_form, sequential
from flax_distil.transcription.long_form import LongFormJob

FRAMES = 9_000
BEGIN = 50_363  # the English tokens' 0.00 s


def window(scene: int, seek: int) -> tuple[list[int], dict[str, float]]:
    """The text from frame `seek` on: tokens with timestamps, and how sure the model is."""
    rng = np.random.default_rng([scene, seek])
    tokens, step, last = [], 0, min(3000, FRAMES - seek) // 2
    while step < last and len(tokens) < 40:
        end = min(step + int(rng.integers(10, 250)), last)
        words = rng.integers(1000, 1030, int(rng.integers(1, 6))).tolist()
        tokens += [BEGIN + step, *words, BEGIN + end]
        step = end + int(rng.choice([0, 0, 20, 180]))
    kind = rng.choice(["closed", "paired", "open", "untimed"])
    if kind == "paired":
        tokens += [tokens[-1], 1000]
    elif kind == "open":
        tokens = tokens[:-1]
    elif kind == "untimed":
        tokens = [token for token in tokens if token < BEGIN]
    sure = dict(
        avg_logprob=float(rng.choice([-0.3, -1.3])), no_speech_prob=float(rng.choice([0.1, 0.9]))
    )
    return tokens, sure


def words_of(scene: int, seek: int, place: int, start: float, end: float) -> list[Word]:
    """Words of the window's segment `place`; in some segments improbable ones, in some none."""
    rng = np.random.default_rng([scene, seek, place])
    improbable = rng.random() < 0.4
    # Both add up times in another order: what lies on an edge of rounding is moved off it.
    edges = (np.linspace(start, end, int(rng.integers(0, 6)) + 1) + 1e-6).round(2).tolist()
    chances = rng.uniform(0, 0.2, 6) if improbable else rng.uniform(0.5, 1, 6)
    return [
        Word(" so", a, b, float(chance))
        for a, b, chance in zip(edges[:-1], edges[1:], chances, strict=False)
    ]


def openai(monkeypatch, scene: int, **options) -> dict:
    """openai-whisper's transcript of the script."""
    module = sys.modules["whisper.transcribe"]
    mel = torch.zeros(80, FRAMES + 3000)
    mel[0] = torch.arange(FRAMES + 3000)  # by which a window tells where it is
    place = {}

    def decode(segment, _):
        place["seek"] = int(segment[0, 0])
        tokens, sure = window(scene, place["seek"])
        return SimpleNamespace(tokens=tokens, temperature=0.0, compression_ratio=1.0, **sure)

    def add_words(*, segments, **_):
        for number, one in enumerate(segments):
            words = words_of(scene, place["seek"], number, one["start"], one["end"])
            one["words"] = [vars(word) for word in words]
            if words:
                one["start"], one["end"] = words[0].start, words[-1].end

    monkeypatch.setattr(module, "log_mel_spectrogram", lambda *_, **__: mel)
    monkeypatch.setattr(module, "add_word_timestamps", add_words)
    dims = SimpleNamespace(n_mels=80, n_audio_ctx=1500, n_text_ctx=448)
    device = torch.device("cpu")
    model = SimpleNamespace(
        device=device, dims=dims, is_multilingual=False, num_languages=99, decode=decode
    )
    return whisper.transcribe(model, None, temperature=0.0, fp16=False, **options)


def ours(monkeypatch, tokens, scene: int, previous_text: bool = True, **options):
    """Our transcript of the script, and the previous text that its windows were given."""
    previous = []
    mel = np.arange(FRAMES, dtype=np.float32)[:, None].repeat(80, 1)

    def decode(_, __, windows):
        found = []
        for one in windows:
            previous.append(one.previous)
            ids, sure = window(scene, one.seed)
            chances = (sure["avg_logprob"], sure["no_speech_prob"], 1.0)
            found.append(Hypothesis(tuple(ids), "", "en", *chances))
        return found

    def timed(_, segments, offset, *__):
        result = []
        for number, one in enumerate(segments):
            words = words_of(scene, round(100 * offset), number, one.start, one.end)
            ends = (words[0].start, words[-1].end) if words else (one.start, one.end)
            result.append(replace(one, start=ends[0], end=ends[1], words=tuple(words)))
        return result

    monkeypatch.setattr(long_form, "recording_mel", lambda *_: mel)
    monkeypatch.setattr(sequential, "encode_audio", lambda *_, **__: AudioStates(None))
    monkeypatch.setattr(sequential, "decode_with_fallback", decode)
    monkeypatch.setattr(sequential, "align_words", lambda _, __, texts, *___, **____: texts)
    monkeypatch.setattr(sequential, "assign_words", timed)
    spec = Spec(WhisperDims(80, 51_864, 16, 1, 2, 2, 2, 64, 64), "float32")
    recognizer = Recognizer(spec, {"encoder": None}, tokens, previous_text=previous_text)
    job = LongFormJob(
        recognizer,
        DecodeOptions(timestamps=True),
        Window("en"),
        sequential=SequentialOptions((0.0,), **options),
    )
    *_, (_, _, found) = sequential.transcribe_sequentially(job, [mel[:, 0]])
    return found, previous


def test_a_model_trained_without_the_text_before_is_not_told_of_it(monkeypatch, tiny_en_folder):
    tokens = load_tokens(tiny_en_folder)
    for previous_text, option, expected in [
        (True, True, True),
        (True, False, False),
        (False, True, False),
    ]:
        options = {"condition_on_previous_text": option, "previous_text": previous_text}
        found, previous = ours(monkeypatch, tokens, 0, **options)
        assert len(found.segments) > len(previous) > 2
        assert any(previous) is expected


def test_windows_follow_each_other_as_in_openai(monkeypatch, tiny_en_folder):
    tokens, changed = load_tokens(tiny_en_folder), 0
    for scene in range(25):
        clips, texts = (5, 40, 50) if scene % 3 == 0 else (), []
        for threshold in (None, 0.5, 2.0):
            options = dict(word_timestamps=True, hallucination_silence_threshold=threshold)
            theirs = openai(monkeypatch, scene, **options, clip_timestamps=list(clips))
            found, _ = ours(monkeypatch, tokens, scene, **options, clips=clips)
            segments = found.as_dict()["segments"]
            assert len(segments) == len(theirs["segments"])
            for mine, other in zip(segments, theirs["segments"], strict=True):
                assert (mine["seek"], mine["text"]) == (other["seek"], other["text"])
                assert (list(mine["tokens"]), list(mine["words"])) == (
                    other["tokens"],
                    other["words"],
                )
                assert mine["start"] == pytest.approx(other["start"])
                assert mine["end"] == pytest.approx(other["end"])
            assert found.text == theirs["text"]
            texts.append(found.text)
        changed += len(set(texts)) - 1
    assert changed > 10
