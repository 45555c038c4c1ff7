"""Word timestamps against openai-whisper's, step by step and with the same weights."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whisper
from whisper import timing
from whisper.tokenizer import get_tokenizer

from flax_distil.audio.load import pad_or_trim
from flax_distil.decode.recognizer import encode, make_recognizer, recognize
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.student import init_student
from flax_distil.options import DecodeOptions
from flax_distil.text.tokens import load_tokens
from flax_distil.transcription import Segment
from flax_distil.transcription.alignment import heads_like, median_filter, time_warp
from flax_distil.transcription.words import (
    Aligned,
    align_words,
    assign_words,
    merge_punctuation,
    split_words,
)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (20, 90), (90, 20)])
def test_time_warp(shape):
    cost = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(np.stack(time_warp(cost)), timing.dtw_cpu(cost))


def test_median_filter():
    x = np.random.default_rng(0).normal(size=(3, 2, 50)).astype(np.float32)
    expected = timing.median_filter(torch.tensor(x[..., :37]), 7)
    np.testing.assert_array_equal(median_filter(jnp.asarray(x), jnp.int32(37))[..., :37], expected)
    assert np.isfinite(median_filter(jnp.asarray(x), jnp.int32(2))[..., :2]).all()


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", " Well, I'd say: 3.5% of \"it\" isn't (that) bad -- 日 is a sign."),
        ("de", " „Größe“, sagte er … «schön»! 😀👍🏽 Ende"),
        ("ja", "今日は、いい天気ですね。鬱陶しい😀"),
        ("ru", " Здравствуйте, это проверка."),
    ],
)
def test_words_are_split_as_openai_splits_them(base_folder, language, text):
    theirs = get_tokenizer(multilingual=True, language=language, task="transcribe")
    ids = theirs.encode(text)
    words, tokens = theirs.split_to_word_tokens([*ids, theirs.eot])
    ours = split_words(load_tokens(base_folder), ids, language)
    assert ours == list(zip(words, map(tuple, tokens), strict=True))[:-1]
    assert sum((token for _, token in ours), ()) == tuple(ids)


def test_punctuation_is_merged_as_openai_merges_it():
    parts = ["“", ' "', " (", " Hi", ",", " -", "you", '"', ")", ".", " [", "-", "!", " ", "a", "'"]
    theirs = [timing.WordTiming(part, [i], i, i + 1, 0.5) for i, part in enumerate(parts)]
    timing.merge_punctuations(theirs, "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、")
    expected = [(one.word, tuple(one.tokens), one.start) for one in theirs if one.word]
    ours = merge_punctuation([Aligned(part, (i,), i, i + 1, 0.5) for i, part in enumerate(parts)])
    assert [(one.word, one.tokens, one.start) for one in ours] == expected


@pytest.fixture(scope="module")
def decoded(human_clips, tiny_en_folder):
    """Clips, what tiny.en writes for them, and the recogniser and its audio states."""
    recognizer = make_recognizer(load_checkpoint(tiny_en_folder))
    clips = [*[clip for clip, _ in human_clips[:20:5]], *[clip for clip, _ in human_clips[-4:]]]
    windows = np.stack([pad_or_trim(clip) for clip in clips])
    texts = [one.tokens for one in recognize(recognizer, windows, DecodeOptions(max_tokens=100))]
    audio = encode(recognizer.spec, recognizer.params["encoder"], windows)
    return recognizer, clips, texts, audio


def text_segment(tokens, start: float, end: float) -> Segment:
    return Segment(0, 0, start, end, "", tuple(tokens), 0.0, 0.0, 1.0, 0.0)


def halves(text, seconds, eot):
    """A window's text as two segments, with the timestamps that Whisper puts around them."""
    middle = len(text) // 2
    return [
        text_segment((eot + 200, *text[:middle]), 0.0, seconds / 2),
        text_segment(text[middle:], seconds / 2 + 0.1, seconds),
    ]


def openai_words(model, clip, spans, offset, last_speech):
    tokenizer = get_tokenizer(multilingual=False)
    frames = len(clip) // 160
    segments = [
        {"seek": round(offset * 100), "start": one.start, "end": one.end, "tokens": one.tokens}
        for one in spans
    ]
    timing.add_word_timestamps(
        segments=segments,
        model=model,
        tokenizer=tokenizer,
        mel=whisper.log_mel_spectrogram(pad_or_trim(clip)),
        num_frames=frames,
        last_speech_timestamp=last_speech,
    )
    return segments


def test_words_are_where_openai_finds_them(decoded, openai_tiny_en):
    recognizer, clips, texts, audio = decoded
    openai_tiny_en.set_alignment_heads(whisper._ALIGNMENT_HEADS["tiny.en"])
    eot, offset = recognizer.tokens.eot, 10.0
    windows = []
    for clip, text in zip(clips, texts, strict=True):
        spans = halves(text, len(clip) / 16_000, eot)
        windows.append([text_segment(s.tokens, offset + s.start, offset + s.end) for s in spans])
    count = len(clips)
    frames = [len(clip) // 160 for clip in clips]
    texts = [[token for one in spans for token in one.tokens] for spans in windows]
    aligned = align_words(recognizer, audio, texts, ["en"] * count, frames=frames)
    is_text = recognizer.tokens.is_text
    ours = [
        assign_words(words, spans, offset, 9.0, is_text)
        for words, spans in zip(aligned, windows, strict=True)
    ]
    differences, chances = [], []
    for clip, spans, timed in zip(clips, windows, ours, strict=True):
        theirs = openai_words(openai_tiny_en, clip, spans, offset, 9.0)
        for mine, segment in zip(timed, theirs, strict=True):
            assert [one.word for one in mine.words] == [one["word"] for one in segment["words"]]
            for word, other in zip(mine.words, segment["words"], strict=True):
                differences += [abs(word.start - other["start"]), abs(word.end - other["end"])]
                chances.append(abs(word.probability - other["probability"]))
            differences += [abs(mine.start - segment["start"]), abs(mine.end - segment["end"])]
    assert len(differences) > 200
    # Two encoders in float32 differ by rounding: a path may turn one position (20 ms) elsewhere.
    assert np.median(differences) <= 0.04
    assert np.percentile(differences, 95) <= 0.2
    assert np.mean(np.array(differences) < 0.001) > 0.9
    assert max(chances) < 0.01


def test_a_student_has_words_where_its_teacher_does(decoded, tiny_en_folder):
    recognizer, clips, texts, audio = decoded
    student = make_recognizer(init_student(load_checkpoint(tiny_en_folder), 2))
    languages, frames = ["en"] * len(clips), [len(clip) // 160 for clip in clips]
    theirs = align_words(recognizer, audio, texts, languages, frames=frames)
    ours = align_words(student, audio, texts, languages, frames=frames)
    for mine, text in zip(ours, theirs, strict=True):
        assert [one.word for one in mine] == [one.word for one in text]
    starts = lambda rows: np.array([word.start for row in rows for word in row])
    # Untrained: its layers were copied and have not yet learned to work without the others.
    apart = lambda rows: np.median(np.abs(starts(rows) - starts(theirs)))
    assert apart(ours) < 0.3
    # Chosen by the teacher's: the heads of a student that knows none, here the teacher itself.
    windows, seconds = np.stack([pad_or_trim(clip) for clip in clips]), [n / 100 for n in frames]
    unknown = replace(recognizer, alignment_heads=())
    chosen = heads_like(unknown, recognizer, windows, seconds)
    assert set(chosen) <= set(recognizer.alignment_heads)
    timed = lambda heads: align_words(
        replace(unknown, alignment_heads=heads), audio, texts, languages, frames=frames
    )
    assert apart(timed(chosen)) <= 0.04 < apart(timed(((0, 0), (0, 1))))


def test_what_has_no_words(decoded):
    recognizer, _, texts, audio = decoded
    eot = recognizer.tokens.eot
    rows = align_words(
        recognizer, audio, [[], [eot + 200], texts[0]], ["en"] * 3, frames=[100, 100, 1]
    )
    assert rows == [[], [], []]
    assert align_words(recognizer, audio, [], []) == []
    nothing = text_segment((), 1.0, 2.0)
    timed = assign_words([], [nothing], 0.0, 0.0, lambda token: token < eot)
    assert timed == [replace(nothing, words=())]


def test_a_text_that_fills_the_context_has_words(decoded):
    """With the end of text and the task it is longer than the context; the rest has no times."""
    recognizer, _, texts, audio = decoded
    (words,) = align_words(recognizer, audio[:1], [(texts[0] * 50)[:447]], ["en"])
    assert sum(len(word.tokens) for word in words) == 448 - 3


def test_punctuation_is_merged_where_no_word_has_a_length():
    words = [Aligned(" so", (1,), 0.02, 0.02, 0.9), Aligned(".", (2,), 0.02, 0.02, 0.9)]
    (timed,) = assign_words(
        words, [text_segment((1, 2), 0.0, 0.02)], 0.0, 0.0, lambda token: token < 99
    )
    assert [word.word for word in timed.words] == [" so."]


def test_a_word_after_a_pause_is_cut():
    """As openai-whisper: the first word of a window may not swallow the pause before it."""
    words = [Aligned(" So", (1,), 0.0, 5.0, 0.9), Aligned(" it", (2,), 5.0, 5.3, 0.9)]
    words += [Aligned(f" w{i}", (i,), i / 4 + 4.3, i / 4 + 4.55, 0.9) for i in range(4, 9)]
    (timed,) = assign_words(
        words, [text_segment(range(1, 8), 0.0, 7.0)], 0.0, 0.0, lambda token: token < 99
    )
    assert timed.words[0].start == pytest.approx(4.5)
    assert (timed.start, timed.end) == (timed.words[0].start, timed.words[-1].end)
