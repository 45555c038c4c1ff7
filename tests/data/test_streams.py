"""Streams: every utterance once a pass, shuffled, dealt to lanes, left and found again exactly."""

from collections import Counter
from dataclasses import asdict
from itertools import chain, islice, pairwise

import datasets
import numpy as np
import pytest
from test_batches import MULTILINGUAL

from flax_distil.config import DataConfig
from flax_distil.data.batches import TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.sources import Table
from flax_distil.data.streams import LanePlace, read_lane
from flax_distil.data.utterances import Columns, Utterance, UtteranceStream, find_columns
from flax_distil.errors import InputError

SIZE, SHARDS = 23, 4
FIRST = LanePlace()


@pytest.fixture(scope="module")
def stream(flac) -> UtteranceStream:
    """Utterance n has the label n and is one of three of its speaker."""
    rows = {
        "id": [str(n) for n in range(SIZE)],
        "audio": [{"bytes": flac(0.05), "path": None}] * SIZE,
        "token_ids": [[n] for n in range(SIZE)],
        "language": ["en"] * SIZE,
        "speaker": [n // 3 for n in range(SIZE)],
    }
    found = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=SHARDS)
    columns = find_columns(Table(tuple(rows), found), DataConfig("rows"))
    return UtteranceStream(found, columns, DataConfig("rows"))


def lane(stream, start=FIRST, lane=0, lanes=1, buffer=5, seed=(3, 0)):
    return read_lane(stream, lane, lanes, buffer, seed, start)


def test_every_utterance_once_a_pass_in_another_order(stream):
    taken = [one.utterance.id for one in islice(lane(stream), 3 * SIZE)]
    passes = [taken[first : first + SIZE] for first in range(0, 3 * SIZE, SIZE)]
    assert all(sorted(one, key=int) == [str(n) for n in range(SIZE)] for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    plain = [one.utterance.id for one in islice(lane(stream, buffer=1), SIZE)]
    assert plain != passes[0]
    assert any(int(b) - int(a) == 1 for a, b in pairwise(plain))  # unshuffled


def test_lanes_share_nothing(stream):
    ids = [
        [one.utterance.id for one in islice(lane(stream, lane=n, lanes=4), 60)] for n in range(4)
    ]
    assert sum(len(set(one)) for one in ids) == len(set().union(*ids)) == SIZE


@pytest.mark.parametrize("stops", [(1, 7, 30), (5, 5, 18), (23, 23, 1), (22, 2, 2)])
def test_left_and_found_again_more_than_once(stream, stops):
    whole = [(one.utterance.id, one.number, one.after) for one in islice(lane(stream), 80)]
    found, place = [], FIRST
    for stop in stops:
        place = LanePlace(*list(place))  # as JSON keeps it
        part = list(islice(lane(stream, place), stop))
        found += [(one.utterance.id, one.number, one.after) for one in part]
        place = part[-1].after
    assert found == whole[: sum(stops)]


def test_the_one_before_is_of_the_same_speaker_and_shard(stream):
    pairs = [(one.utterance, one.before) for one in islice(lane(stream), SIZE)]
    told = [(one, before) for one, before in pairs if before]
    assert len(told) > 5
    for one, before in told:
        assert int(one.id) == int(before.id) + 1
        assert one.speaker == before.speaker


def loader(stream, tone, batch_size=8, lanes=4, **changes) -> Loader:
    """A stream and a dataset of seven, which is drawn half as often."""
    options = TargetOptions(buckets=(16, 32), prompt_probability=0.5)
    none = np.zeros(0, int)
    streamed = TrainingSource(stream, options, none, none > 0, 2.0, buffer=8)
    known = [Utterance(f"k{n}", tone(0.01), language="en", token_ids=(900 + n,)) for n in range(7)]
    kept = TrainingSource(known, options, np.ones(7, int), np.zeros(7, bool), 1.0)
    return Loader((streamed, kept), MULTILINGUAL, batch_size, lanes=lanes, **changes)


def lines(batches):
    """Tokens of each batch and row, without padding."""
    return [
        [[int(t) for t in row if t != MULTILINGUAL.eot] for row in batch.tokens]
        for batch, _ in batches
    ]


def labels(batches) -> list[int]:
    return [line[-1] for rows in lines(batches) for line in rows]


def test_hosts_come_and_go_and_the_batches_stay(stream, tone):
    """4 hosts, then 1, then 2: the global batches of one host that never stopped."""
    whole = list(islice(loader(stream, tone).batches(LoaderState(5)), 12))
    assert Counter(label >= 900 for label in labels(whole)) == pytest.approx(
        {False: 64, True: 32}, abs=16
    )
    state, found = LoaderState(5), []
    for hosts, steps in [(4, 3), (1, 5), (2, 4)]:
        shares = [
            list(islice(loader(stream, tone, rank=rank, hosts=hosts).batches(state), steps))
            for rank in range(hosts)
        ]
        found += [list(chain(*parts)) for parts in zip(*map(lines, shares), strict=True)]
        ends = [share[-1][1] for share in shares]
        assert len({end.position for end in ends}) == 1
        streams = {name: place for end in ends for name, place in end.streams.items()}
        assert len(streams) == 4 == sum(len(end.streams) for end in ends)  # each lane has one host
        state = LoaderState(**asdict(ends[0]) | {"streams": streams})
    assert found == lines(whole)


def test_two_hosts_never_see_the_same_example_in_a_pass(stream, tone):
    of_host = [
        labels(islice(loader(stream, tone, rank=rank, hosts=2).batches(LoaderState(1)), 30))
        for rank in range(2)
    ]
    streamed = [{label for label in labels if label < 900} for labels in of_host]
    assert not streamed[0] & streamed[1]
    assert len(streamed[0] | streamed[1]) == SIZE


def test_errors(stream, tone):
    with pytest.raises(InputError, match="4 lanes of a stream do not divide over 3 hosts"):
        loader(stream, tone, batch_size=12, hosts=3)
    with pytest.raises(InputError, match="has 4 shards for 8 lanes: use at most 4"):
        loader(stream, tone, batch_size=8, lanes=8)
    with pytest.raises(InputError, match="batch 6 does not divide over 4 lanes: use 4"):
        loader(stream, tone, batch_size=6)
    begun = LoaderState(0, 8, utterances=7)
    with pytest.raises(InputError, match="no position for stream/lane 0/0, 0/1, 0/2, 0/3"):
        next(loader(stream, tone).batches(begun))
    empty = UtteranceStream(
        [], Columns("audio", None, None, None, None, None, True), DataConfig("rows")
    )
    with pytest.raises(InputError, match="rows is a stream without utterances"):
        next(lane(empty))
