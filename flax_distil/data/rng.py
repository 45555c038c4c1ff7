"""Random numbers that a few integers determine, without global state or order of calls."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for; each purpose has its own for the same integers."""

    SOURCE = 1  # (run, block of draws)
    PASS = 2  # (run, source, pass): the order of a dataset
    SHARDS = 3  # (run, source, lane, pass): the order of a stream's shards
    BLOCK = 4  # (run, source, lane, pass, shard, row): the order of a shuffled block
    EXAMPLE = 5  # (run, source, lane, pass, number): timestamps, prompt
    NOISE = 6  # the same: recording, excerpt, level
    MASKS = 7  # the same: SpecAugment
    CONTEXT = 8  # the same: length of the student's audio


def generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A Philox generator, seeded by purpose and numbers."""
    # NumPy treats a list with trailing zeros as the same seed, so the length is part of it.
    entropy = [len(numbers), int(purpose), *numbers]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
