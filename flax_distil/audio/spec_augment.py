"""SpecAugment without time warping (Park et al. 2019, arXiv 1904.08779): time and bin masks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from flax_distil.audio import SAMPLE_RATE
from flax_distil.audio.log_mel import HOP
from flax_distil.config import AugmentConfig


def spec_augment(
    keys_B: UInt32[Array | np.ndarray, "B 2"],
    mel_BTM: Float[Array | np.ndarray, "B T M"],
    seconds_B: Float[Array | np.ndarray, "B"],
    options: AugmentConfig,
) -> Float[Array, "B T M"]:
    """The log-mel with masks of each clip's mean; jit-able, `options` static.

    Lengths of masks are uniform from 0 to their maximum, their starts uniform where they fit. Time
    masks are inside the clip, not its padding, and each covers at most `time_mask_share` of it.

    keys_B: key data (as `jax.random.key_data`) of each clip. seconds_B: lengths before padding.
    """
    # At least one frame: the mean of none is NaN, which would reach the whole batch's gradient.
    frames_B = jnp.clip(seconds_B * SAMPLE_RATE / HOP, 1, mel_BTM.shape[1])
    return jax.vmap(partial(_augmented, options=options))(keys_B, mel_BTM, frames_B)


def _augmented(key: Any, mel_TM: Any, frames: Array, options: AugmentConfig) -> Array:
    in_time, in_frequency = jax.random.split(jax.random.wrap_key_data(key))
    longest = jnp.minimum(options.time_mask_frames, options.time_mask_share * frames)
    hidden_T = masks(in_time, mel_TM.shape[0], frames, longest, options.time_masks)
    bins = mel_TM.shape[1]
    widest = jnp.minimum(options.frequency_mask_bins, bins)
    hidden_M = masks(in_frequency, bins, bins, widest, options.frequency_masks)
    sounds_T = jnp.arange(mel_TM.shape[0]) < frames
    mean = jnp.mean(mel_TM, where=sounds_T[:, None])
    return jnp.where(hidden_T[:, None] | hidden_M[None], mean, mel_TM)


def masks(
    key: Array, size: int, end: Shaped[Array, ""] | int, longest: Shaped[Array, ""], count: int
) -> Bool[Array, "{size}"]:
    """True under any of `count` masks of up to `longest` positions, inside the first `end`."""
    lengths, starts = jax.random.uniform(key, (2, count))
    lengths = jnp.floor(lengths * (longest + 1))
    starts = jnp.floor(starts * (end - lengths + 1))
    place = jnp.arange(size)[:, None]
    after = starts[None] <= place
    return jnp.any(after & (place < (starts + lengths)[None]), axis=1)
