"""Whisper's long-form algorithm against openai-whisper's own."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import whisper

from flax_distil.config import ExportConfig
from flax_distil.decode.assistant import make_assistant
from flax_distil.decode.prompts import prompt_ids
from flax_distil.decode.recognizer import AudioStates, make_recognizer
from flax_distil.decode.search import Hypothesis, Window
from flax_distil.errors import InputError
from flax_distil.export import run
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student
from flax_distil.options import DecodeOptions
from flax_distil.text.wer import word_errors
from flax_distil.transcription import (
    ChunkedOptions,
    SequentialOptions,
    sequential,
    transcribe,
    transcribe_all,
)
from flax_distil.transcription.long_form import LongFormJob, split_segments
from flax_distil.transcription.sequential import (
    RecordingState,
    begin_recording,
    needs_fallback,
    previous_tokens,
)

PLAIN = SequentialOptions(temperatures=(0.0,))


@pytest.fixture(scope="module")
def tiny_en(tiny_en_folder):
    return make_recognizer(load_checkpoint(tiny_en_folder))


@pytest.fixture(scope="module")
def talk(human_clips):
    """Some 75 s of both people, with pauses."""
    pause = np.zeros(8_000, np.float32)
    clips = [clip for clip, _ in human_clips[:10] + human_clips[-3:]]
    return np.concatenate([part for clip in clips for part in (clip, pause)])[: 75 * 16_000]


def check(ours, theirs):
    """Texts differ in at most 0.5 % of words, boundaries by 0.2 s at most in 95 %."""
    assert word_errors([theirs["text"]], [ours.text]).rate <= 0.005
    assert len(ours.segments) == len(theirs["segments"])
    times = np.array([(one.start, one.end) for one in ours.segments])
    expected = np.array([(one["start"], one["end"]) for one in theirs["segments"]])
    assert (np.abs(times - expected) <= 0.2).mean() >= 0.95
    for one, other in zip(ours.segments, theirs["segments"], strict=True):
        assert one.seek == other["seek"]
        assert one.avg_logprob == pytest.approx(other["avg_logprob"], abs=0.02)


@pytest.mark.parametrize("condition", [True, False])
def test_real_speech_is_read_as_openai_reads_it(tiny_en, openai_tiny_en, talk, condition):
    theirs = whisper.transcribe(
        openai_tiny_en,
        talk,
        temperature=0.0,
        condition_on_previous_text=condition,
        initial_prompt="A telephone system.",
        fp16=False,
    )
    ours = transcribe(
        talk,
        tiny_en,
        prompt="A telephone system.",
        long_form=SequentialOptions((0.0,), condition_on_previous_text=condition),
    )
    check(ours, theirs)


def test_clips_and_thresholds_are_openai_s(tiny_en, openai_tiny_en, talk):
    options = dict(no_speech_threshold=0.001, logprob_threshold=-0.3)
    theirs = whisper.transcribe(
        openai_tiny_en, talk, temperature=0.0, clip_timestamps=[5, 20, 30], fp16=False, **options
    )
    ours = transcribe(
        talk, tiny_en, long_form=SequentialOptions((0.0,), clips=(5, 20, 30), **options)
    )
    check(ours, theirs)


def test_files_of_one_batch_do_not_disturb_each_other(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    rng = np.random.default_rng(0)
    audio = [0.1 * rng.standard_normal(16_000 * n).astype(np.float32) for n in (35, 4, 40)]
    options = DecodeOptions(max_tokens=8, best_of=2)
    # Random models doubt all they write: each window is tried at both temperatures.
    long_form = SequentialOptions((0.0, 0.8), no_speech_threshold=None)
    together = {}
    read = [0.0, 0.0, 0.0]
    for number, seconds, done in transcribe_all(
        recognizer, audio, options, long_form, batch_size=2
    ):
        read[number] += seconds
        together |= {number: done} if done else {}
    np.testing.assert_allclose(read, [35, 4, 40])
    for number, waveform in enumerate(audio):
        alone = transcribe(waveform, recognizer, options=options, long_form=long_form)
        assert [one.tokens for one in together[number].segments] == [
            one.tokens for one in alone.segments
        ]
        assert {one.temperature for one in alone.segments} == {0.8}


def test_what_needs_fallback():
    def result(doubt: float, silence: float, ratio: float) -> Hypothesis:
        return Hypothesis((1,), "a", "en", doubt, silence, ratio)

    options = SequentialOptions()
    assert not needs_fallback(result(-0.5, 0.9, 1.0), options)
    assert needs_fallback(result(-0.5, 0.9, 2.5), options)
    assert needs_fallback(result(-1.5, 0.1, 1.0), options)
    assert not needs_fallback(result(-1.5, 0.9, 2.5), options)  # silence
    assert not needs_fallback(result(-1.5, 0.1, 2.5), SequentialOptions((0.0,), None, None, None))


def test_windows_are_split_between_two_timestamps():
    # 100 is 0.00 s; size in frames, times in steps of two frames
    assert (
        split_segments((100, 1, 150, 150, 2, 200), range(100, 1601), 3000)[1] == 3000
    )  # ends alone: nothing follows
    assert split_segments((100, 1, 150, 150, 2, 200, 200), range(100, 1601), 3000) == (
        [(0, 50, (100, 1, 150)), (50, 100, (150, 2, 200))],
        200,
    )
    assert split_segments((100, 1, 150, 150, 2), range(100, 1601), 3000) == (
        [(0, 50, (100, 1, 150))],
        100,
    )
    assert split_segments((100, 1, 2), range(100, 1601), 2500) == ([(0, 1250, (100, 1, 2))], 2500)
    assert split_segments((100, 1, 120), range(100, 1601), 2500) == ([(0, 20, (100, 1, 120))], 2500)
    # An added word has an id behind that of 30 s.
    assert split_segments((100, 1, 1700, 150, 150, 1701), range(100, 1601), 3000) == (
        [(0, 50, (100, 1, 1700, 150))],
        100,
    )
    assert split_segments((), range(100, 1601), 2500) == ([(0, 1250, ())], 2500)


def test_words_end_where_segments_do(tiny_en, talk):
    long_form = SequentialOptions((0.0,), word_timestamps=True)
    found = transcribe(talk[: 20 * 16_000], tiny_en, long_form=long_form)
    assert len(found.segments) > 1
    for segment in found.segments:
        assert segment.words
        assert "".join(word.word for word in segment.words) == segment.text
        assert segment.start <= segment.words[0].end
        assert segment.words[-1].start <= segment.end
        starts = [word.start for word in segment.words]
        assert starts == sorted(starts)


@pytest.mark.parametrize("seconds", [2.5, 40])
def test_the_language_is_detected_from_the_same_audio_as_in_openai(
    monkeypatch, base_folder, seconds
):
    recognizer, encoded = make_recognizer(load_checkpoint(base_folder)), []

    def encode_audio(_, mel, **__):
        encoded.append(mel)
        return AudioStates(None)

    monkeypatch.setattr(sequential, "encode_audio", encode_audio)
    monkeypatch.setattr(sequential, "likeliest_languages", lambda *_: ["de"])
    sound = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)
    job = LongFormJob(recognizer, DecodeOptions(), Window())
    assert begin_recording(job, sound).start.language == "de"
    mel = whisper.log_mel_spectrogram(sound, padding=whisper.audio.N_SAMPLES)
    expected = whisper.pad_or_trim(mel, 3000).numpy().T
    np.testing.assert_allclose(encoded[0][0], expected, atol=1e-4)


def test_a_prompt_for_every_window_is_whole_beside_hotwords(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    prompt, options = tuple(range(1000, 1100)), DecodeOptions(hotwords="Marianne, Elinor")
    mel, tokens = np.zeros((0, 80), np.float32), [*prompt, *range(300)]
    one = RecordingState(mel, [], Window("en", prompt), tokens=tokens)
    carry = SequentialOptions(carry_prompt=True)
    job = LongFormJob(recognizer, options, one.start, sequential=carry)
    previous = previous_tokens(job, one)
    ids = prompt_ids(recognizer.tokens, recognizer.context, options, Window("en", previous))
    hot = recognizer.tokens.encode(" Marianne, Elinor")
    assert ids[1 : ids.index(recognizer.tokens.sot)] == [
        *hot,
        *prompt,
        *range(300 - (223 - 100 - len(hot)), 300),
    ]


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match="none below 0"):
        SequentialOptions(())
    for clips in ((5.0, 1.0), (-1.0,), (0.0, float("inf")), (float("nan"),)):
        with pytest.raises(InputError, match="none before another"):
            SequentialOptions(clips=clips)


@pytest.mark.parametrize("long_form", [PLAIN, ChunkedOptions(15)])
def test_an_assistant_changes_no_text(monkeypatch, tiny_en, tiny_en_folder, talk, long_form):
    monkeypatch.setattr("flax_distil.decode.recognizer.CPU_DRAFT_ROWS", 8)
    assistant = make_assistant(tiny_en, init_student(load_checkpoint(tiny_en_folder), [0, 1, 3]), 3)
    arguments = dict(audio=talk[: 20 * 16_000], model=tiny_en, long_form=long_form)
    plain, found = transcribe(**arguments), transcribe(**arguments, assistant=assistant)
    assert len(found.text) > 100
    assert found.text == plain.text
    assert [(one.start, one.end, one.tokens) for one in found.segments] == [
        (one.start, one.end, one.tokens) for one in plain.segments
    ]
    assert found.acceptance.tokens_per_pass > 1
    assert plain.acceptance is None
    assert found.as_dict().keys() == plain.as_dict().keys()
    with pytest.raises(InputError, match="cannot help 5 beams"):
        transcribe(**arguments, options=DecodeOptions(beams=5), assistant="lookup")


@pytest.mark.parametrize("long_form", [PLAIN, ChunkedOptions(10)])
def test_an_assistant_that_does_not_pay_is_given_up(random_folders, monkeypatch, long_form):
    """After enough rejected draft tokens the rest of a recording is decoded without it."""
    monkeypatch.setattr("flax_distil.decode.drafters.ENOUGH_DRAFTS", 20)
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    audio = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 50).astype(np.float32)
    options = dict(options=DecodeOptions(max_tokens=8), long_form=long_form, batch_size=1)

    def drafted(break_even: float) -> int:
        assistant = replace(make_assistant(recognizer, None), break_even=break_even)
        found = transcribe(audio, recognizer, **options, assistant=assistant)
        assert found.text == transcribe(audio, recognizer, **options).text
        return found.acceptance.drafted

    assert drafted(0.0) > 2 * drafted(1.0) > 0


@pytest.mark.parametrize("long_form", [SequentialOptions((0.0, 0.8)), ChunkedOptions(10)])
def test_an_assistant_with_an_encoder_of_its_own(monkeypatch, random_folders, long_form):
    """Its encoder is not the model's, and what is drawn after a doubt is drawn without it."""
    monkeypatch.setattr("flax_distil.decode.recognizer.CPU_DRAFT_ROWS", 8)
    teacher = load_checkpoint(random_folders[0])
    recognizer = make_recognizer(teacher)
    params = jax.device_get(Spec(teacher.dims).init(jax.random.key(1)))
    assistant = make_assistant(recognizer, replace(teacher, params=params), 2)
    assert assistant.encoder is not None
    audio = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 35).astype(np.float32)
    arguments = dict(options=DecodeOptions(max_tokens=8, best_of=2), long_form=long_form)
    plain = transcribe(audio, recognizer, **arguments)
    found = transcribe(audio, recognizer, **arguments, assistant=assistant)
    assert plain.segments
    assert [one.tokens for one in found.segments] == [one.tokens for one in plain.segments]


@pytest.fixture(scope="module")
def faster_tiny_en(tiny_en_folder, tmp_path_factory):
    from faster_whisper import WhisperModel

    folder = tmp_path_factory.mktemp("faster") / "tiny.en"
    run(ExportConfig(str(tiny_en_folder), folder, format=("ctranslate2",)))
    return WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)


def test_a_prefix_opens_the_first_window_as_in_faster_whisper(
    tiny_en, faster_tiny_en, human_clips, talk
):
    """A prefix without a time before it is closed at once, and the rest of the sentence lost."""
    options = {
        "language": "en",
        "temperature": 0.0,
        "beam_size": 1,
        "condition_on_previous_text": False,
    }
    recordings = [
        (human_clips[5][0], "There is currently"),
        (talk[: 40 * 16_000], "That agent is already"),
    ]
    plain = replace(PLAIN, condition_on_previous_text=False)
    for waveform, prefix in recordings:
        theirs = list(faster_tiny_en.transcribe(waveform, prefix=prefix, **options)[0])
        ours = transcribe(waveform, tiny_en, options=DecodeOptions(prefix=prefix), long_form=plain)
        expected = "".join(segment.text for segment in theirs)
        assert expected.startswith(f" {prefix}")
        assert word_errors([expected], [ours.text]).rate <= 0.005
        assert ours.segments[0].start == theirs[0].start == 0
        assert ours.segments[0].end == pytest.approx(theirs[0].end, abs=0.2)
