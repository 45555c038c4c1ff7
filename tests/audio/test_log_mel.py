"""Against Transformers' numpy feature extractor, which works in float64, and its filter bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.audio.load import pad_or_trim, to_int16
from flax_distil.audio.log_mel import log_mel, mel_by_matrices, mel_filters


def vowels(seconds: float) -> np.ndarray:
    """Something like speech: gliding harmonics under formants, syllables, pauses, faint noise."""
    random = np.random.default_rng(3)
    time = np.arange(int(16_000 * seconds)) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * time)) / 16_000
    formant = 700 + 300 * np.sin(2 * np.pi * 1.3 * time)
    voice = sum(
        np.sin(k * phase) / k * np.exp(-(((120 * k - formant) / 900) ** 2)) for k in range(1, 40)
    )
    voice *= np.clip(np.sin(2 * np.pi * 2.1 * time), 0, 1)
    return (0.3 * voice + 1e-4 * random.standard_normal(len(time))).astype(np.float32)


CLIPS = {
    "vowels": pad_or_trim(vowels(11)),
    "full window": vowels(30),
    "silence": np.zeros(480_000, np.float32),
    "noise": np.random.default_rng(0).normal(0, 0.2, 480_000).astype(np.float32),
    "faint noise": np.random.default_rng(1).normal(0, 1e-5, 480_000).astype(np.float32),
    "impulse": np.eye(1, 480_000, 7777, dtype=np.float32)[0],
    "loud edges": np.concatenate([np.ones(300), np.zeros(479_400), -np.ones(300)]).astype("f4"),
}


@pytest.fixture(scope="module")
def extract():
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    def features(waveform: np.ndarray, mels: int) -> np.ndarray:
        # The numpy path: the call itself would take the float32 torch path where torch is there.
        extractor = WhisperFeatureExtractor(feature_size=mels)
        return extractor._np_extract_fbank_features(waveform[None], "cpu")[0].T

    return features


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("clip", CLIPS)
def test_equal_to_transformers(extract, clip, mels):
    mel = np.asarray(jax.jit(log_mel, static_argnums=1)(CLIPS[clip][None], mels))
    assert mel.shape == (1, 3000, mels)
    assert mel.dtype == np.float32
    np.testing.assert_allclose(mel[0], extract(CLIPS[clip], mels), atol=1e-4)


@pytest.mark.parametrize("samples", [160 * 7, 16_000, 16_079, 16_159])
def test_any_length(extract, samples):
    clip = CLIPS["noise"][:samples]
    mel = np.asarray(log_mel(clip[None], 80))
    assert mel.shape == (1, samples // 160, 80)
    np.testing.assert_allclose(mel[0], extract(clip, 80), atol=1e-4)


def test_rows_do_not_mix_and_int16_is_scaled():
    clips = np.stack([CLIPS["vowels"], CLIPS["noise"], CLIPS["silence"]])[:, :32_000]
    together = np.asarray(log_mel(clips, 80))
    for row, clip in zip(together, clips, strict=True):
        np.testing.assert_allclose(row, np.asarray(log_mel(clip[None], 80))[0], atol=1e-5)
    integers = to_int16(clips)
    np.testing.assert_array_equal(
        np.asarray(log_mel(integers, 80)), np.asarray(log_mel(integers / np.float32(32768), 80))
    )


def test_bfloat16_audio_is_computed_in_float32():
    assert log_mel(jnp.zeros((1, 1600), jnp.bfloat16), 80).dtype == jnp.float32


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("clip", CLIPS)
def test_the_accelerators_way_is_as_close(extract, clip, mels, monkeypatch):
    monkeypatch.setattr("flax_distil.audio.log_mel.mel_by_fft", mel_by_matrices)
    mel = np.asarray(jax.jit(lambda x, m: log_mel(x, m), static_argnums=1)(CLIPS[clip][None], mels))
    np.testing.assert_allclose(mel[0], extract(CLIPS[clip], mels), atol=1e-4)


def test_the_tpu_program_is_float32_products_without_fft():
    traced = jax.jit(log_mel, static_argnums=1).trace(CLIPS["noise"][None, :1600], 80)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 4
    assert all("HIGHEST" in line for line in products)
    assert "fft" not in program


@pytest.mark.parametrize("mels", [80, 128])
def test_filters_equal_transformers(mels):
    from transformers.audio_utils import mel_filter_bank

    expected = mel_filter_bank(201, mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(mels), expected, atol=1e-15)
