import numpy as np
import pytest
import whisper

from flax_distil.audio.log_mel import log_mel
from flax_distil.transcription.long_form import pad_window, recording_mel


@pytest.mark.parametrize("samples", [0, 100, 800, 480_000, 480_160, 1_000_007])
@pytest.mark.parametrize("mels", [80, 128])
def test_pieces_equal_openai_on_the_whole(samples, mels):
    rng = np.random.default_rng(samples)
    loudness = np.linspace(0.001, 0.3, samples, dtype=np.float32)  # the floor is the end's
    audio = loudness * rng.standard_normal(samples, np.float32)
    found = recording_mel(audio, mels)
    assert found.shape == (samples // 160, mels)
    if samples >= 800:
        expected = whisper.log_mel_spectrogram(audio, mels, padding=480_000).numpy().T
        # Both are float32; 128 bins have narrower filters and smaller powers.
        np.testing.assert_allclose(found, expected[: len(found)], atol=5e-5)


def test_a_window_of_one_clip_is_its_log_mel():
    audio = np.random.default_rng(0).standard_normal(480_000).astype(np.float32)
    expected = np.asarray(log_mel(audio[None], 80))[0]
    found = pad_window(recording_mel(audio, 80), 0, 3000)
    # The last frames see silence behind the recording, where log_mel mirrors it.
    np.testing.assert_allclose(found[:-2], expected[:-2], atol=1e-5)
    part = pad_window(found, 2900, 50)
    assert part.shape == (3000, 80)
    assert np.array_equal(part[:50], found[2900:2950])
    assert not part[50:].any()
