"""Noise at the level it says, previous text, recordings from clips, and sounds without speech."""

import numpy as np
import pytest

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.load import encode_flac
from flax_distil.errors import InputError
from flax_distil.evaluate.conditions import (
    Condition,
    PreviousText,
    ReferenceClip,
    joined,
    noise_conditions,
    non_speech_clips,
)


def clip(number: int, seconds: float = 1.0, language: str = "en") -> ReferenceClip:
    draw = np.random.default_rng(number)
    level = 10 ** draw.uniform(-3, -1)  # clips are loud and quiet
    waveform = level * draw.normal(size=round(seconds * SAMPLE_RATE))
    return ReferenceClip(
        f"c{number}", waveform.astype(np.float32), f"t{number} w{number}", language
    )


BANK = [clip(number, 0.5 + 0.1 * number) for number in range(9)]


def decibels(ratio: np.floating) -> float:
    return float(10 * np.log10(ratio))


@pytest.fixture
def recordings(tmp_path):
    noise = np.random.default_rng(3).normal(size=9_000).cumsum()
    (tmp_path / "storm.flac").write_bytes(encode_flac((noise / 999).astype(np.float32)))
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["white", "babble", "recorded"])
def test_the_noise_is_as_loud_as_it_says(kind, recordings):
    conditions = noise_conditions((20.0, -10.0), ("white", "babble"), recordings)
    for condition in conditions:
        if not condition.setting.startswith(kind):
            continue
        asked = float(condition.setting.split(", ")[1].removesuffix(" dB"))
        for before, after in zip(BANK, condition.apply(BANK, BANK, "d", 0), strict=True):
            noise = after.waveform.astype(float) - before.waveform
            measured = decibels(np.mean(before.waveform.astype(float) ** 2) / np.mean(noise**2))
            assert measured == pytest.approx(asked, abs=0.1)


def test_recordings_of_noise_may_have_any_length_and_silence(tmp_path, caplog):
    """Shorter than the clip, longer, nearly all silent; damaged and silent ones are left out."""
    noise = np.random.default_rng(0).normal(0, 0.1, 40_000).astype(np.float32)
    sounds = {"short": noise[:50], "long": noise, "silent": np.zeros(8_000, np.float32)}
    sounds["gaps"] = np.concatenate([np.zeros(300_000, np.float32), noise[:4_000]])
    for name, sound in sounds.items():
        (tmp_path / f"{name}.flac").write_bytes(encode_flac(sound))
    (tmp_path / "broken.flac").write_bytes(b"nothing")
    (condition,) = noise_conditions((0.0,), (), str(tmp_path))
    for name in ("silent", "broken"):
        assert f"{name}.flac is left out" in caplog.text
    for before, after in zip(BANK, condition.apply(BANK, BANK, "d", 0), strict=True):
        added = after.waveform.astype(float) - before.waveform
        ratio = np.mean(before.waveform.astype(float) ** 2) / np.mean(added**2)
        assert decibels(ratio) == pytest.approx(0, abs=0.1)
    for path in tmp_path.glob("*"):
        if path.stem not in ("silent", "broken"):
            path.unlink()
    with pytest.raises(InputError, match="no recording of noise that is not damaged or silent"):
        noise_conditions((0.0,), (), str(tmp_path))
    with pytest.raises(InputError, match="without a ratio"):
        noise_conditions((), ("white",), str(tmp_path))


def test_noise_depends_on_seed_and_clip_alone():
    (condition,) = noise_conditions((5.0,), ("babble",), None)
    take = lambda clips, seed=0: [c.waveform for c in condition.apply(clips, BANK, "d", seed)]
    np.testing.assert_array_equal(take(BANK)[4], take(BANK[4:5])[0])
    assert not np.array_equal(take(BANK)[4], take(BANK, seed=1)[4])


def test_a_clip_is_not_its_own_babble():
    (condition,) = noise_conditions((5.0,), ("babble",), None)
    with pytest.raises(InputError, match="other clips"):
        list(condition.apply(BANK[:1], BANK[:1], "d", 0))


def test_previous_text_is_that_of_other_clips():
    condition = Condition("prompt", "50 tokens", PreviousText(50))
    for one in condition.apply(BANK, BANK, "d", 0):
        words = one.previous.split()
        assert len(words) == 38  # of 1.3 tokens each
        assert not set(words) & set(one.reference.split())


def test_recordings_are_made_of_consecutive_clips_of_a_language():
    clips = [clip(n, 4.0, "fr" if n == 2 else "en") for n in range(6)]
    recordings = list(joined(clips, seconds=9.0))
    assert [one.reference for one in recordings] == ["t0 w0 t1 w1", "t3 w3 t4 w4", "t2 w2", "t5 w5"]
    assert recordings[0].seconds == 8.5
    np.testing.assert_array_equal(recordings[0].waveform[: 4 * SAMPLE_RATE], clips[0].waveform)


def test_clips_without_speech():
    clips, again = list(non_speech_clips(10, seed=1)), list(non_speech_clips(10, seed=1))
    for one, two in zip(clips, again, strict=True):
        np.testing.assert_array_equal(one.waveform, two.waveform)
        assert 2 <= one.seconds <= 30
        loudness = np.sqrt(np.mean(one.waveform.astype(float) ** 2))
        if "silence" in one.id:
            assert not one.waveform.any()
        else:
            assert -60.1 < 2 * decibels(loudness) < -19.9
    assert [one.id for one in clips[:5]] == [
        "000 silence",
        "001 white noise",
        "002 brown noise",
        "003 hum",
        "004 music",
    ]
