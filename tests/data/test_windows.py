"""Clips in order, padded, and what is left out."""

import threading
import time
import tracemalloc

import numpy as np
import pytest

from flax_distil.audio import load
from flax_distil.audio.container import decoded_frames
from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioError, encode_flac, to_int16
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import (
    DecodedClip,
    decode_clip,
    decode_clips,
    join_parts,
    part_offsets,
    window_batches,
)
from flax_distil.data.workers import map_in_order


def test_in_order_keeps_the_order_and_runs_ahead():
    started = []

    def slow_first(number):
        started.append(number)
        time.sleep(0.05 if number == 0 else 0.0)
        return number

    results = map_in_order(slow_first, range(20), workers=4, ahead=5)
    assert next(results) == 0
    assert 2 <= len(started) <= 7  # ahead of the consumer, and not further
    assert list(results) == list(range(1, 20))


def test_in_order_stops_its_threads_when_left_early():
    before = set(threading.enumerate())
    results = map_in_order(lambda number: number, range(100), workers=2, ahead=5)
    next(results)
    results.close()
    assert not set(threading.enumerate()) - before


def test_thirty_seconds_are_kept_and_more_is_not(tone):
    def heard(samples: int) -> DecodedClip | Skipped:
        return decode_clip(Utterance("a", np.zeros(samples, np.float32)))

    assert heard(CLIP_SAMPLES).duration == 30.0  # type: ignore[union-attr]
    # A resampler's surplus is cut off; what is really longer is not touched.
    assert heard(CLIP_SAMPLES + 160).duration == 30.0  # type: ignore[union-attr]
    assert heard(CLIP_SAMPLES + 161) == Skipped("a", "too long: 30.01 s, a window has 30 s")


def test_of_a_long_clip_no_more_is_decoded_than_shows_it(monkeypatch):
    """Few bytes that hold much: a second behind the window is decoded, in little memory."""
    seconds = []

    def counted(*arguments):
        for frame in decoded_frames(*arguments):
            seconds.append(frame.samples / frame.rate)
            yield frame

    monkeypatch.setattr(load, "decoded_frames", counted)
    bomb = encode_flac(np.zeros(600 * SAMPLE_RATE, np.float32))
    assert len(bomb) < 50_000
    tracemalloc.start()
    found = decode_clip(Utterance("a", bomb))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == Skipped("a", "too long: 31.00 s or more, a window has 30 s")
    assert sum(seconds) < 33
    assert peak < 31 * SAMPLE_RATE * 4 * 5  # a few copies
    assert isinstance(decode_clip(Utterance("a", bomb, offset=300.0)), Skipped)
    part = decode_clip(Utterance("a", bomb, offset=300.0, duration=29.5))
    assert isinstance(part, DecodedClip)
    assert part.duration == 29.5
    assert sum(seconds) < 33 + 2 * 36


def test_windows(tone, flac):
    utterances = [
        Utterance(str(n), tone(0.1 * (n + 1)) if n % 2 else flac(0.1 * (n + 1))) for n in range(5)
    ]
    batches = list(window_batches(utterances, batch_size=2))
    assert [batch.waveforms.shape for batch in batches] == [(2, CLIP_SAMPLES)] * 3
    assert [u.id for batch in batches for u in batch.utterances] == list("01234")
    for n in range(5):
        samples, row = to_int16(tone(0.1 * (n + 1))), batches[n // 2].waveforms[n % 2]
        assert np.array_equal(row[: len(samples)], samples)
        assert not row[len(samples) :].any()
    assert np.array_equal(batches[2].waveforms[1], batches[2].waveforms[0])


def window(*parts: Utterance, pause: float = 0.5) -> Utterance:
    """A packed window that believes what its parts tell of their durations."""
    return join_parts(parts, pause)


def test_a_window_has_the_times_of_its_sound(tone):
    """Durations of the manifest are wrong by a second; those of the samples count."""
    planned = window(*(Utterance(str(n), tone(n + 1.0), duration=2.0) for n in range(3)))
    (clip,) = decode_clips(planned)
    assert isinstance(clip, DecodedClip)
    assert [part.duration for part in clip.utterance.parts] == [1.0, 2.0, 3.0]
    assert part_offsets(clip.utterance) == [0.0, 1.5, 4.0]
    assert clip.utterance.id == planned.id
    assert clip.utterance.duration == clip.duration == 7.0


def test_a_window_that_grows_is_split_and_not_lost(tone):
    """Three parts of 12 s that claim 9 s: two windows, each clip once."""
    parts = [Utterance(str(n), tone(12.0, 300.0 + n), f"t{n}", duration=9.0) for n in range(3)]
    first, second = decode_clips(window(*parts))
    assert isinstance(first, DecodedClip)
    assert isinstance(second, DecodedClip)
    assert [part.id for part in first.utterance.parts] == ["0", "1"]
    assert (first.utterance.text, second.utterance.text) == ("t0 t1", "t2")
    assert (first.duration, second.duration) == (24.5, 12.0)
    assert first.utterance.id != window(*parts).id
    np.testing.assert_array_equal(second.samples, to_int16(tone(12.0, 302.0)))
    turns = [decode_clip(window(*parts), turn) for turn in range(3)]
    assert [one.duration for one in turns] == [24.5, 12.0, 24.5]  # type: ignore[union-attr]
    (both,) = window_batches([window(*parts)], batch_size=2)
    assert [one.id for one in both.utterances] == [first.utterance.id, "2"]


def test_a_damaged_part_costs_its_window_that_part_alone(tone, caplog):
    bad = Utterance("bad", b"no audio", duration=1.0)
    (clip,) = decode_clips(window(Utterance("a", tone(1.0)), bad, Utterance("b", tone(2.0))))
    assert isinstance(clip, DecodedClip)
    assert [part.id for part in clip.utterance.parts] == ["a", "b"]
    assert clip.duration == 3.5
    assert "bad is left out of its window" in caplog.text
    lost = decode_clip(window(bad, bad))
    assert isinstance(lost, Skipped)
    assert "not an audio file" in lost.reason


def test_a_corrupt_clip_among_good_ones(tone, flac, tmp_path):
    utterances = [
        Utterance("good", tone(0.1)),
        Utterance("noise", b"this is no audio"),
        Utterance("absent", str(tmp_path / "absent.wav")),
        Utterance("empty", b""),
        Utterance("faulty", tone(0.1), fault="row 4 has duration xx"),
        Utterance("good too", flac(0.2)),
    ]
    skipped: list[Skipped] = []
    batches = list(window_batches(utterances, batch_size=4, skipped=skipped.append))
    assert [u.id for batch in batches for u in batch.utterances] == ["good", "good too"]
    assert [clip.id for clip in skipped] == ["noise", "absent", "empty", "faulty"]
    assert "no such audio file" in skipped[1].reason
    with pytest.raises(AudioError, match=r"^noise: "):
        list(window_batches(utterances, batch_size=4))
