"""Augmentation of training clips: additive noise, and the settings of SpecAugment."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int16

from flax_distil.audio.load import AudioError, to_int16
from flax_distil.audio.noise import mean_power, mix_at_snr, noise_excerpt
from flax_distil.config import AugmentConfig, DataConfig
from flax_distil.data.rng import Purpose, generator
from flax_distil.data.utterances import Utterances, load_waveform, read_dataset
from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

DECODED_RECORDINGS = 32  # in memory

# (samples, seed of the example) → samples of the same length
AddNoise = Callable[[Int16[np.ndarray, "n"], tuple[int, ...]], Int16[np.ndarray, "n"]]


def uses_spec_augment(config: AugmentConfig) -> bool:
    """Whether SpecAugment is on."""
    return config.time_masks + config.frequency_masks > 0


def check_augmentation(config: AugmentConfig) -> None:
    """Raises InputError for numbers out of their range."""
    for name in ("noise_probability", "time_mask_share"):
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise InputError(f"{name} {value:g} must be between 0 and 1")
    for name in ("time_masks", "frequency_masks", "time_mask_frames", "frequency_mask_bins"):
        if (value := getattr(config, name)) < 0:
            raise InputError(f"{name} {value} must not be negative: 0 is none")
    low, high = config.snr_db
    if low > high:
        raise InputError(f"snr_db goes from {low:g} to {high:g}: give the lower number first")


def open_noise(config: AugmentConfig) -> AddNoise | None:
    """Additive noise from the recordings of `config.noise`; None where that is not set.

    The seed determines whether a clip gets noise, the recording, its start and its level.

    Raises:
        InputError: the recordings cannot be read, or a number is out of range.
    """
    check_augmentation(config)
    if config.noise is None:
        return None
    recordings = read_dataset(DataConfig(str(config.noise)))
    if not isinstance(recordings, Utterances):
        raise InputError(f"{config.noise} is a stream: noise is a folder or list of files")
    return Noise(recordings, config)


@dataclass(frozen=True, eq=False)
class Noise:
    """Adds noise of these recordings; can be pickled."""

    recordings: Utterances
    config: AugmentConfig

    def __call__(self, samples: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
        """The samples with or without noise, scaled so that none is clipped."""
        random = generator(Purpose.NOISE, *seed)
        if random.random() >= self.config.noise_probability:
            return samples
        snr_db = random.uniform(*self.config.snr_db)
        try:
            recording = _load_recording(self, int(random.integers(len(self.recordings))))
        except AudioError as error:
            logger.warning("a clip is left without noise: %s", error)
            return samples
        noise = noise_excerpt(random, recording, len(samples))
        if not mean_power(noise):
            return samples  # silence has no level
        mixed = mix_at_snr(samples.astype(np.float32) / 32768, noise, snr_db)
        return to_int16(mixed / max(1.0, float(np.abs(mixed).max())))


@lru_cache(DECODED_RECORDINGS)
def _load_recording(noise: Noise, number: int) -> np.ndarray:
    return load_waveform(noise.recordings[number])
