"""Chunks and their merging against Transformers' pipeline."""

from itertools import pairwise

import numpy as np
import pytest

from flax_distil.audio.load import pad_or_trim
from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.decode.search import Hypothesis
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import DecodeOptions
from flax_distil.transcription import ChunkedOptions, chunked, transcribe, transcribe_all
from flax_distil.transcription.chunked import ChunkSpan, cut_chunks, merge, merge_timed


def test_merging_equals_transformers():
    from transformers.models.whisper.tokenization_whisper import _find_longest_common_sequence

    rng = np.random.default_rng(0)
    for _ in range(100):
        spoken = rng.integers(0, 30, 40)
        places = np.sort(rng.choice(40, 4))
        texts = [spoken[max(0, at - 4) : at + 14] for at in (0, *places)]
        # One token in ten is wrong.
        texts = [np.where(rng.random(t.size) < 0.1, 99, t).tolist() for t in texts]
        merged = merge(texts)
        assert len(merged) == len(texts)
        together = [token for part in merged for token in part]
        assert together == [int(t) for t in _find_longest_common_sequence(texts)]
    assert merge([]) == []
    assert merge([(), (1, 2), ()]) == [(), (1, 2), ()]


BEGIN = 50_363  # the English tokens' 0.00 s
TIMES = range(BEGIN, BEGIN + 1501)


def test_a_sentence_spelled_in_two_ways_is_merged_once():
    """As in real speech; a segment that both chunks cut becomes one again."""
    at = lambda seconds: BEGIN + round(seconds / 0.02)
    pieces = cut_chunks(50 * 16_000, ChunkedOptions(30, 5))
    left = (at(0), 1, at(20), at(20.4), 2, 3, at(25), at(25.4), 14, 5, 6, 7, at(28), at(28.2), 8)
    right = (at(0.5), 2, 3, at(5.1), at(5.3), 4, 5, 6, 7, 8, at(10), at(12), 9, at(14))
    spans = merge_timed([left, right], pieces, TIMES)
    texts = [span.tokens for span in spans]
    assert texts == [(1,), (2, 3), (14, 5, 6, 7, 8), (9,)]
    assert [(span.start, span.end) for span in spans[2:]] == [(25.4, 30), (32, 34)]
    assert sum(texts, ()) == sum(
        merge([[t for t in ids if t < BEGIN] for ids in (left, right)]), ()
    )
    words = [tuple(token + 10**6 if token < BEGIN else token for token in left), ()]
    assert merge_timed(words, pieces, TIMES)[1] == ChunkSpan(0, 20.4, 25, (2 + 10**6, 3 + 10**6))
    assert merge_timed([(), right], pieces, TIMES)[0] == ChunkSpan(1, 20.5, 25.1, (2, 3))
    assert merge_timed([left, ()], pieces, TIMES)[-1] == ChunkSpan(0, 28.2, 30, (8,))


def test_no_word_is_put_together_from_two_spellings():
    """ "open-source PBX. Two" and "Open Source PBX. Do", laid over each other a token apart."""
    at = lambda seconds: BEGIN + round(seconds / 0.02)
    pieces = cut_chunks(50 * 16_000, ChunkedOptions(30, 5))
    left = (at(22), 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, at(29))
    right = (at(2), 1, 2, 3, 20, 21, 13, 14, 15, 22, 17, at(9))
    merged = [span.tokens for span in merge_timed([left, right], pieces, TIMES)]
    assert merged == [(1, 2, 3, 10, 11, 12, 13, 14, 15, 22, 17)]
    halves = merge([left[1:-1], right[1:-1]])
    assert sum(halves, ()) == (1, 2, 3, 10, 11, 21, 13, 14, 15, 22, 17)


@pytest.mark.parametrize("seconds", [0.5, 30, 30.1, 50, 70.3, 100])
@pytest.mark.parametrize("stride", [None, 0.0, 2.0])
def test_cuts_equal_transformers(seconds, stride):
    from transformers import WhisperFeatureExtractor
    from transformers.pipelines.automatic_speech_recognition import chunk_iter

    chunked = ChunkedOptions(30, stride)
    samples = round(seconds * 16_000)
    overlap = round(chunked.overlap * 16_000)
    extractor = WhisperFeatureExtractor()
    extractor.__class__ = type(
        "Fast", (WhisperFeatureExtractor,), {"__call__": lambda self, chunk, **_: {}}
    )
    theirs = chunk_iter(np.arange(samples), extractor, 480_000, overlap, overlap)
    expected = [one["stride"] for one in theirs]
    ours = [
        (stop - start, first - start, stop - last)
        for start, stop, first, last in cut_chunks(samples, chunked)
    ]
    assert ours[: len(expected)] == expected
    assert len(ours) == len(expected)
    # What the chunks are there for lies side by side.
    pieces = cut_chunks(samples, chunked)
    assert pieces[0][2] == 0
    assert pieces[-1][3] == samples
    assert all(one[3] == following[2] for one, following in pairwise(pieces))


def test_chunks_are_decoded_as_recognize_does(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    rng = np.random.default_rng(0)
    long, short = (0.1 * rng.standard_normal(16_000 * n).astype(np.float32) for n in (15, 4))
    chunked, options = ChunkedOptions(10, 2), DecodeOptions(max_tokens=6)
    found = [
        one for *_, one in transcribe_all(recognizer, [long, short], options, chunked, batch_size=3)
    ]
    first, second = (one for one in found if one is not None)
    windows = np.stack([pad_or_trim(one) for one in (long[:160_000], long[96_000:], short)])
    hypotheses = recognize(recognizer, windows, options)
    expected = merge([one.tokens for one in hypotheses[:2]])
    assert [segment.tokens for segment in first.segments] == expected
    assert [(segment.start, segment.end) for segment in first.segments] == [(0, 8), (8, 15)]
    assert [segment.tokens for segment in second.segments] == [hypotheses[2].tokens]
    alone = transcribe(short, recognizer, options=options, long_form=chunked)
    assert (alone.text, len(alone.segments)) == (second.text, 1)


def test_a_chunk_is_read_on_from_its_last_timestamp(random_folders, monkeypatch):
    """What follows the last pair of timestamps is decoded again, in a window that begins there."""
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    at = lambda seconds: recognizer.tokens.timestamp_begin + round(seconds / 0.02)
    script = {  # by the second at which a window begins
        0: (at(0), 1, at(4), at(4), 99),  # ends early
        4: (at(0), 2, 3, 4, 5, at(14.2), at(14.2)),  # from 18 s on the next chunk is used
        16: (at(0), 4, 5, at(2.2), at(2.2), 6, 7, at(6), at(6), 8, at(16), at(16), 9),
    }
    starts = []

    def decode(_, __, ___, windows):
        starts.append([window.seed / 16_000 for window in windows])
        texts = [script[second] for second in starts[-1]]
        return [Hypothesis(ids, "", "en", -1.0 / len(starts), 0.1, 1.0) for ids in texts]

    monkeypatch.setattr(chunked, "decode", decode)
    sound = np.ones(50 * 16_000, np.float32)
    sound[32 * 16_000 :] = 0  # what the third chunk begins with
    options, long_form = DecodeOptions(timestamps=True), ChunkedOptions(20, 2)
    found = transcribe(sound, recognizer, options=options, long_form=long_form, batch_size=2)
    assert starts == [[0, 16], [4]]
    expected = [(0, 4, (1,)), (4, 18.2, (2, 3, 4, 5)), (18.2, 22, (6, 7))]
    expected += [(22, 32, (8,)), (32, 36, (9,))]
    assert [(one.start, one.end, one.tokens) for one in found.segments] == expected
    # Of the first chunk's two windows, five and seven tokens with the ends of their texts.
    assert found.segments[0].avg_logprob == pytest.approx(-(6 * 1 + 8 / 2) / 14)


def test_wrong_chunks_are_refused():
    with pytest.raises(InputError, match="at most 30 s"):
        ChunkedOptions(40)
    with pytest.raises(InputError, match="use less than 5 s"):
        ChunkedOptions(10, 5)
    with pytest.raises(InputError, match="leaves nothing"):
        ChunkedOptions(1e-5)
