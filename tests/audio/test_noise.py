import numpy as np
import pytest

from flax_distil.audio.noise import mix_at_snr, noise_excerpt, white_noise
from flax_distil.errors import InputError

CLIP = (0.1 * np.sin(np.arange(16_000) / 7)).astype(np.float32)


def power(waveform):
    return np.mean(waveform.astype(np.float64) ** 2)


@pytest.mark.parametrize("snr_db", [40.0, 10.0, 0.0, -10.0])
@pytest.mark.parametrize("level", [1e-3, 1.0, 5.0])
def test_the_noise_lies_where_it_was_asked(snr_db, level):
    noisy = mix_at_snr(CLIP, level * white_noise(0, CLIP.size), snr_db)
    added = noisy.astype(np.float64) - CLIP
    assert noisy.dtype == np.float32
    assert 10 * np.log10(power(CLIP) / power(added)) == pytest.approx(snr_db, abs=0.01)


def test_white_noise_is_white_seeded_and_of_unit_power():
    noise = white_noise((3, 7), 160_000)
    np.testing.assert_array_equal(noise, white_noise((3, 7), 160_000))
    assert not np.array_equal(noise, white_noise((3, 8), 160_000))
    assert power(noise) == pytest.approx(1, rel=0.02)
    lows, highs = np.array_split(np.abs(np.fft.rfft(noise)) ** 2, 2)
    assert lows.mean() == pytest.approx(highs.mean(), rel=0.03)


def test_excerpts_loop():
    recording = np.arange(5, dtype=np.float32)
    excerpt = noise_excerpt(1, recording, 12)
    np.testing.assert_array_equal(np.diff(excerpt) % 5, np.ones(11))
    starts = {float(noise_excerpt(seed, recording, 1)[0]) for seed in range(60)}
    assert starts == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_silence():
    silent = np.zeros(100, np.float32)
    np.testing.assert_array_equal(mix_at_snr(silent, white_noise(0, 100), 0.0), silent)
    with pytest.raises(InputError, match="silent"):
        mix_at_snr(CLIP, np.zeros_like(CLIP), 0.0)
    with pytest.raises(InputError, match="16000 samples and the noise 99"):
        mix_at_snr(CLIP, white_noise(0, 99), 0.0)
    with pytest.raises(InputError, match="0 samples"):
        noise_excerpt(0, np.zeros(0, np.float32), 10)
