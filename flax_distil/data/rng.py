"""Random numbers that a few integers determine: never a global state, never the order of asking."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What numbers are drawn for; equal integers draw others for another purpose."""

    SOURCE = 1  # (run, block of draws)
    PASS = 2  # (run, source, pass): the order of a dataset
    SHARDS = 3  # (run, source, lane, pass): the order of a stream's shards
    BLOCK = 4  # (run, source, lane, pass, shard, row): the order of a shuffled block
    EXAMPLE = 5  # (run, source, lane, pass, number): timestamps, prompt
    NOISE = 6  # the same: recording, excerpt, level
    MASKS = 7  # the same: SpecAugment


def generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Philox, seeded by purpose and numbers alone."""
    # numpy takes a list and the same list with zeros behind it for one seed; so the length counts.
    entropy = [len(numbers), int(purpose), *numbers]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
