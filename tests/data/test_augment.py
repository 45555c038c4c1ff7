"""Noise at the level that is asked for, the same in every run, and only where it is on."""

from itertools import islice

import numpy as np
import pytest
from test_batches import MULTILINGUAL

from flax_distil.audio.load import encode_flac
from flax_distil.config import AugmentConfig
from flax_distil.data.augment import open_noise, uses_spec_augment
from flax_distil.data.batches import TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError


@pytest.fixture
def recordings(tmp_path):
    random = np.random.default_rng(0)
    for number in range(3):
        noise = 0.05 * (number + 1) * random.standard_normal(20_000).astype(np.float32)
        (tmp_path / f"{number}.flac").write_bytes(encode_flac(np.clip(noise, -1, 1)))
    return tmp_path


@pytest.fixture
def samples(tone):
    return (tone(1.0) * 32767).astype(np.int16)


def level(samples, mixed) -> float:
    """SNR in dB."""
    clean, noise = samples.astype(float), mixed.astype(float) - samples
    return 10 * np.log10(np.square(clean).mean() / np.square(noise).mean())


def test_levels_are_uniform_in_the_range(recordings, samples):
    add = open_noise(AugmentConfig(recordings, noise_probability=1.0, snr_db=(10.0, 30.0)))
    levels = [level(samples, add(samples, (0, number))) for number in range(200)]
    assert min(levels) == pytest.approx(10, abs=0.7)
    assert max(levels) == pytest.approx(30, abs=0.7)
    assert np.mean(levels) == pytest.approx(20, abs=1.6)  # 4 deviations


def test_loud_noise_is_not_cut_off(recordings, samples):
    add = open_noise(AugmentConfig(recordings, noise_probability=1.0, snr_db=(-20.0, -20.0)))
    mixed = add(samples, (0, 1))
    assert np.abs(mixed.astype(int)).max() >= 32_766
    assert (np.abs(mixed.astype(int)) >= 32_766).sum() < 5  # made quieter, not clipped


def test_the_seed_decides(recordings, samples):
    add = open_noise(AugmentConfig(recordings, noise_probability=0.25))
    mixed = [add(samples, (5, number)) for number in range(400)]
    touched = [not np.array_equal(one, samples) for one in mixed]
    assert np.mean(touched) == pytest.approx(0.25, abs=0.09)
    assert len({one.tobytes() for one in mixed}) == sum(touched) + 1
    again = open_noise(AugmentConfig(recordings, noise_probability=0.25))
    assert all(np.array_equal(again(samples, (5, n)), mixed[n]) for n in reversed(range(400)))


def batches(tone, **changes):
    rows = [Utterance(str(n), tone(0.3), language="en", token_ids=(7,)) for n in range(6)]
    source = TrainingSource(rows, TargetOptions(), np.ones(6, int), np.zeros(6, bool))
    return list(islice(Loader((source,), MULTILINGUAL, 3, **changes).batches(LoaderState(2)), 6))


def test_the_loader_adds_noise_and_keys_that_are_each_example_s(recordings, tone):
    plain = batches(tone)
    assert all(batch.keys is None for batch, _ in plain)
    add = open_noise(AugmentConfig(recordings, noise_probability=1.0))
    found = batches(tone, add_noise=add, masks=True)
    again = batches(tone, add_noise=add, masks=True, workers=1)
    keys = np.concatenate([batch.keys for batch, _ in found])
    assert len(np.unique(keys, axis=0)) == 18  # another pass, other masks
    sounds = {row.tobytes() for batch, _ in found for row in batch.waveforms}
    assert len(sounds) == 18  # the six clips are one and the same; the noise is not
    for (one, _), (two, _), (clean, _) in zip(found, again, plain, strict=True):
        assert np.array_equal(one.keys, two.keys)
        assert np.array_equal(one.waveforms, two.waveforms)
        assert np.array_equal(one.tokens, clean.tokens)
        assert not np.array_equal(one.waveforms[:, :4800], clean.waveforms[:, :4800])
        assert not one.waveforms[:, 4800:].any()


def test_off_by_default():
    assert open_noise(AugmentConfig()) is None
    assert not uses_spec_augment(AugmentConfig())
    assert uses_spec_augment(AugmentConfig(frequency_masks=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_probability": 1.5}, r"noise_probability 1\.5 must be between 0 and 1"),
        ({"time_masks": -1}, "time_masks -1 must not be negative"),
        ({"snr_db": (20.0, 5.0)}, "snr_db goes from 20 to 5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError, match=message):
        open_noise(AugmentConfig(**options))
