"""A stream without end: read shard by shard, shuffled a block at a time, left and found again.

A stream's shards are dealt to lanes; a lane is read by one host, and a run keeps its number of
lanes, so that hosts may come and go. A lane takes its shards in an order of each pass, fills a
buffer, gives it out in an order of its own, and fills it again. A buffer whose items are replaced
one by one would shuffle a little further, but to leave it would mean to save it, audio and all.

Where a lane stands is counted here, in shards and rows: four numbers in a checkpoint, the same for
any version of `datasets`. Its own `state_dict` is not used: it leaves out its shuffle buffer, and a
host would know only its own. To go on reads the shard that the block begins in up to its row, and
no shard before it.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from flax_distil.data.rng import Purpose, generator
from flax_distil.data.utterances import Utterance, UtteranceStream, continues
from flax_distil.errors import InputError


class LanePlace(NamedTuple):
    """Where a lane stands: so many of the block that begins at this row are given out."""

    passes: int = 0
    shard: int = 0
    """Of the lane's shards, in the order of the pass."""
    row: int = 0
    taken: int = 0


class Streamed(NamedTuple):
    """An utterance of a lane, the one spoken before it if it was read, its number, and after."""

    utterance: Utterance
    before: Utterance | None
    number: int
    """Of the pass: shards and rows, told by one number for seeds."""
    after: LanePlace
    """Where the lane stands after it."""


def read_lane(
    stream: UtteranceStream,
    lane: int,
    lanes: int,
    buffer: int,
    seed: tuple[int, int],
    start: LanePlace,
) -> Iterator[Streamed]:
    """The utterances of one lane from a place on, pass after pass.

    buffer: utterances of a block. seed: of the run and the source.
    Raises InputError for a stream without utterances.
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
    """Place of the shard, row in it, and utterance."""
    for place, shard in enumerate(shards[start.shard :], start.shard):
        first = start.row if place == start.shard else 0
        for row, utterance in enumerate(islice(stream.shard(shard), first, None), first):
            yield place, row, utterance


def check_lanes(stream: UtteranceStream, lanes: int, hosts: int) -> None:
    """Raises InputError where a stream cannot be dealt to so many lanes, or they to hosts."""
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
