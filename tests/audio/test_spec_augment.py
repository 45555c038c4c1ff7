"""Masks: as many, as long and where the options say, the same for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_distil.audio.spec_augment import masks, spec_augment
from flax_distil.config import AugmentConfig


@pytest.fixture(scope="module")
def clips():
    """Log-mel of 64 clips of 2 s and 64 of 30 s, keys and lengths; no value equals a mean."""
    random = np.random.default_rng(0)
    mel_BTM = random.normal(size=(128, 3000, 16)).astype(np.float32)
    keys_B = random.integers(1 << 32, size=(128, 2), dtype=np.uint32)
    return keys_B, mel_BTM, np.repeat(np.array([2.0, 30.0], np.float32), 64)


def hidden(clips, **options):
    _, mel_BTM, seconds_B = clips
    augment = jax.jit(spec_augment, static_argnums=3)
    augmented = np.asarray(augment(*clips, AugmentConfig(**options)))
    changed = augmented != mel_BTM
    for clip, seconds, one, mask in zip(mel_BTM, seconds_B, augmented, changed, strict=True):
        mean = clip[: int(seconds * 100)].mean()
        np.testing.assert_allclose(one[mask], mean, atol=1e-5)
    return changed


def test_off_changes_nothing(clips):
    assert not hidden(clips).any()


def test_stretches_of_time_where_the_clip_sounds(clips):
    changed = hidden(clips, time_masks=2, time_mask_frames=100, time_mask_share=0.2)
    in_time = changed.any(axis=2)
    assert (changed == in_time[:, :, None]).all()  # all bins
    assert not in_time[:64, 200:].any()
    lengths = in_time.sum(axis=1)
    assert lengths[:64].max() <= 2 * 40  # a fifth of 2 s, twice
    assert 100 < lengths[64:].max() <= 2 * 100
    # Uniform lengths from 0 to 40 and from 0 to 100; stretches may lie over each other.
    assert lengths[:64].mean() == pytest.approx(36, abs=8)
    assert lengths[64:].mean() == pytest.approx(98, abs=20)
    assert in_time[64:].any(axis=0).mean() > 0.8  # everywhere in the clip
    assert ((np.diff(in_time.astype(int), axis=1) == 1).sum(axis=1) <= 2).all()


def test_bands_of_frequency_through_padding(clips):
    changed = hidden(clips, frequency_masks=1, frequency_mask_bins=5)
    bands = changed.any(axis=1)
    assert (changed == bands[:, None]).all()
    assert set(bands.sum(axis=1)) == {0, 1, 2, 3, 4, 5}
    assert bands.any(axis=0).all()


def test_a_clip_that_was_not_heard_stays_finite(clips):
    keys_B, mel_BTM, _ = clips
    options = AugmentConfig(time_masks=2, frequency_masks=2)
    augmented = spec_augment(keys_B, mel_BTM, jnp.zeros(len(keys_B)), options)
    assert jnp.isfinite(augmented).all()


def test_a_clip_s_masks_are_its_key_s(clips):
    options = {"time_masks": 2, "frequency_masks": 1, "frequency_mask_bins": 5}
    changed = hidden(clips, **options)
    assert len({mask.tobytes() for mask in changed[64:]}) == 64
    alone = tuple(part[70:71] for part in clips)
    assert (hidden(alone, **options)[0] == changed[70]).all()


def test_a_mask_may_be_as_long_as_all():
    found = masks(jax.random.key(1), 10, 10, jnp.asarray(10.0), 40)
    assert found.all()
    assert not masks(jax.random.key(1), 10, 10, jnp.asarray(0.0), 40).any()
