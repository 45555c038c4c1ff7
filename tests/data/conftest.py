"""Small clips whose samples are known, as files and as rows."""

import numpy as np
import pytest

from flax_distil.audio.load import encode_flac

RATE = 16_000


@pytest.fixture(scope="session")
def tone():
    """`tone(seconds, hertz)`: float32 samples."""

    def make(seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
        time = np.arange(round(seconds * RATE)) / RATE
        return (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def flac(tone):
    """`flac(seconds, hertz)`: the bytes of a FLAC file."""
    return lambda seconds=0.5, hertz=440.0: encode_flac(tone(seconds, hertz))
