"""Endless, shuffled and resumable reading of a stream.

The shards of a stream are divided into lanes. A lane is read by one host; the number of lanes is
fixed for a run, so that the number of hosts may change. A lane reads its shards in a new order each
pass, in blocks that are shuffled. A buffer whose items are replaced one by one would shuffle
further, but would have to be saved with its audio.

The position of a lane is four numbers in a checkpoint, independent of the version of `datasets`,
whose `state_dict` lacks the shuffle buffer and the lanes of other hosts. Resuming reads the shard
that the block begins in up to its row, and no earlier shard.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from flax_distil.data.rng import Purpose, generator
from flax_distil.data.utterances import Utterance, UtteranceStream, continues
from flax_distil.errors import InputError


class LanePlace(NamedTuple):
    """The position of a lane: `taken` utterances of the block that begins at `row` are read."""

    passes: int = 0
    shard: int = 0
    """Among the lane's shards, in the order of the pass."""
    row: int = 0
    taken: int = 0


class Streamed(NamedTuple):
    """An utterance of a lane, and the previous utterance if it was read."""

    utterance: Utterance
    before: Utterance | None
    number: int
    """Shard and row in one number, for seeds."""
    after: LanePlace
    """The lane's position after it."""


def read_lane(
    stream: UtteranceStream,
    lane: int,
    lanes: int,
    buffer: int,
    seed: tuple[int, int],
    start: LanePlace,
) -> Iterator[Streamed]:
    """The utterances of one lane from a position on, pass after pass.

    buffer: utterances of a block. seed: of the run and the source.

    Raises:
        InputError: the stream has no utterances.
    """
    mine = np.arange(lane, stream.shards, lanes)
    place = start
    while True:
        shards = generator(Purpose.SHARDS, *seed, lane, place.passes).permutation(mine)
        rows = _rows(stream, shards.tolist(), place)
        while block := list(islice(rows, buffer)):
            order = generator(Purpose.BLOCK, *seed, lane, *place[:3]).permutation(len(block))
            for taken, number in enumerate(order.tolist()):
                if taken >= place.taken:
                    shard, row, utterance = block[number]
                    last, _, before = block[max(number - 1, 0)]
                    adjacent = number > 0 and shard == last and continues(utterance, before)
                    yield Streamed(
                        utterance,
                        before if adjacent else None,
                        (shard << 32) + row,
                        place._replace(taken=taken + 1),
                    )
            shard, row, _ = block[-1]
            place = LanePlace(place.passes, shard, row + 1)
        if place == LanePlace(place.passes):
            raise InputError(f"{stream.config.source} is a stream without utterances")
        place = LanePlace(place.passes + 1)


def _rows(
    stream: UtteranceStream, shards: list[int], start: LanePlace
) -> Iterator[tuple[int, int, Utterance]]:
    """Position of the shard, row in it, and utterance."""
    for place, shard in enumerate(shards[start.shard :], start.shard):
        first = start.row if place == start.shard else 0
        for row, utterance in enumerate(islice(stream.shard(shard), first, None), first):
            yield place, row, utterance


def check_lanes(stream: UtteranceStream, lanes: int, hosts: int) -> None:
    """Raises InputError where a stream has too few shards, or lanes do not divide over hosts."""
    if lanes % hosts:
        raise InputError(
            f"{lanes} lanes of a stream do not divide over {hosts} hosts: use lanes = "
            f"{-(-lanes // hosts) * hosts}, for all of the run"
        )
    if stream.shards < lanes:
        raise InputError(
            f"{stream.config.source} has {stream.shards} shards for {lanes} lanes: use at most "
            f"{stream.shards} lanes, or download it (streaming = false)"
        )
