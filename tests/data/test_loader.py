"""The order of training: complete, seeded, and the same after any number of restarts."""

from dataclasses import asdict, replace
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_batches import BEGIN, MULTILINGUAL

from flax_distil.config import AugmentConfig
from flax_distil.data.audio_states import StateFolder, clip_names, load_or_encode
from flax_distil.data.augment import open_noise
from flax_distil.data.batches import TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import Utterance, read_dataset
from flax_distil.data.windows import join_parts
from flax_distil.errors import InputError

SIZE, START = 11, LoaderState(1)


@pytest.fixture(scope="module")
def utterances(tone):
    """Label n has n text tokens between two timestamps; clip n sounds at its own pitch."""
    return [
        Utterance(
            str(n), tone(0.01 * (n + 1)), language="en", token_ids=(BEGIN, *range(n), BEGIN + 9)
        )
        for n in range(SIZE)
    ]


def loader(utterances, batch_size=4, **changes) -> Loader:
    lengths = np.array([len(utterance.token_ids or ()) for utterance in utterances], int)
    options = TargetOptions(buckets=(8, 12, 32), prompt_probability=0.5)
    source = TrainingSource(utterances, options, lengths, np.arange(len(utterances)) > 5)
    return Loader((source,), MULTILINGUAL, batch_size, **changes)


def facts(batch):
    return (
        batch.rows.tolist(),
        batch.tokens.tolist(),
        batch.weights.tolist(),
        batch.seconds.tolist(),
        batch.waveforms[:, :3000].tobytes(),
    )


def test_resume_twice_is_the_run_that_never_stopped(utterances):
    whole = list(islice(loader(utterances).batches(LoaderState(1)), 9))
    resumed, state = [], LoaderState(1)
    for steps in (2, 4, 3):  # the first stop inside an epoch, the second in the next but one
        state = LoaderState(**asdict(state))  # as a checkpoint keeps it
        part = list(islice(loader(utterances).batches(state), steps))
        resumed += part
        state = part[-1][1]
    assert [facts(batch) for batch, _ in resumed] == [facts(batch) for batch, _ in whole]
    assert [state for _, state in resumed] == [state for _, state in whole]
    assert state == LoaderState(1, position=36, utterances=SIZE)


def test_threads_and_batches_ahead_change_nothing(utterances):
    expected = list(islice(loader(utterances).batches(LoaderState()), 5))
    for workers, ahead in [(1, 0), (7, 5)]:
        other = loader(utterances, workers=workers, ahead=ahead).batches(LoaderState())
        assert [facts(b) for b, _ in islice(other, 5)] == [facts(b) for b, _ in expected]


def test_processes_give_what_threads_give(tmp_path, flac):
    """Rows of Parquet, and noise that each process opens for itself."""
    audio = [{"bytes": flac(0.05 + 0.01 * n), "path": None} for n in range(6)]
    table = {"id": list("abcdef"), "audio": audio, "token_ids": [[n] for n in range(6)]}
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    rows = read_dataset(tmp_path / "labels.parquet")
    noise = open_noise(AugmentConfig(tmp_path / "labels.parquet", noise_probability=0.5))
    options = TargetOptions(language="en")
    source = TrainingSource(rows, options, np.ones(6, int), np.zeros(6, bool))
    found = [
        list(islice(Loader((source,), MULTILINGUAL, 3, add_noise=noise, **who).batches(START), 4))
        for who in ({"workers": 2}, {"processes": 1})
    ]
    threads, processes = ([facts(batch) for batch, _ in batches] for batches in found)
    assert threads == processes


def test_hosts_share_the_global_batches(utterances):
    alone = list(islice(loader(utterances).batches(LoaderState(2)), 5))
    shares = [
        list(islice(loader(utterances, rank=rank, hosts=2).batches(LoaderState(2)), 5))
        for rank in range(2)
    ]
    for (whole, state), (first, one), (second, two) in zip(alone, *shares, strict=True):
        assert whole.waveforms.dtype == np.int16
        assert whole.rows.tolist() == first.rows.tolist() + second.rows.tolist()
        assert np.array_equal(whole.tokens, np.concatenate([first.tokens, second.tokens]))
        assert state == one == two


def test_a_restart_on_other_hosts_and_batch_sizes_keeps_the_sequence(utterances):
    (_, state), *_ = islice(loader(utterances).batches(LoaderState(3)), 1)
    rest = [
        row
        for batch, _ in islice(loader(utterances, batch_size=2).batches(state), 6)
        for row in batch.rows.tolist()
    ]
    expected = [
        row
        for batch, _ in islice(loader(utterances).batches(LoaderState(3)), 4)
        for row in batch.rows.tolist()
    ]
    assert rest == expected[4:]


def test_the_bucket_holds_the_longest_row(utterances):
    prompts = 0
    for batch, _ in islice(loader(utterances).batches(LoaderState()), 8):
        ends = [np.flatnonzero(weights)[-1] + 1 for weights in batch.weights]
        assert all((batch.targets[row, end - 1] == 50257) for row, end in enumerate(ends))
        bound = [(len(utterances[row].token_ids) + 4) for row in batch.rows]
        prompted = batch.tokens[:, 0] == MULTILINGUAL.previous
        prompts += prompted.sum()
        bound += prompted * (1 + len(utterances[0].token_ids) + batch.rows - 1)
        assert batch.tokens.shape[1] == next(size for size in (8, 12, 32) if size >= max(bound))
    assert 3 < prompts < 15  # half of those that follow another: 5 of 11


def test_timestamps_follow_seed_epoch_and_utterance(utterances):
    kept = {}
    for batch, _ in islice(loader(utterances).batches(LoaderState(4)), 11):
        for row, tokens in zip(batch.rows.tolist(), batch.tokens, strict=True):
            kept.setdefault(row, []).append(bool((tokens == BEGIN).any()))
    flips = [fall for falls in kept.values() for fall in falls]
    assert 8 < sum(flips) < 36  # 44 throws
    assert any(len(set(falls)) == 2 for falls in kept.values())  # another epoch, another fall


def test_a_clip_that_is_gone_is_silence_of_weight_0(utterances, caplog):
    broken = [*utterances[:3], replace(utterances[3], audio=b"no audio")]
    ((batch, _),) = islice(loader(broken).batches(LoaderState()), 1)
    row = batch.rows.tolist().index(3)
    assert batch.weights.sum(axis=1).astype(bool).sum() == 3
    assert not batch.weights[row].any()
    assert not batch.waveforms[row].any()
    assert "3 has weight 0" in caplog.text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"language": "Klingon"}, 'Whisper has no language "Klingon"'),
        ({"token_ids": None}, "no label to learn"),
    ],
)
def test_what_cannot_be_taught_is_left_out_as_in_labelling(utterances, caplog, change, why):
    strange = [*utterances[:3], replace(utterances[3], **change)]
    ((batch, _),) = islice(loader(strange).batches(LoaderState()), 1)
    heard = batch.weights.any(axis=1)
    assert sorted(batch.rows[heard].tolist()) == [0, 1, 2]
    assert f"3 has weight 0: {why}" in caplog.text


def test_states_of_a_split_window_are_read_as_its_audio_is(tone, tmp_path):
    """A window of 3 × 12 s that the dataset gives as 3 × 9 s: every part is trained on in turn."""
    parts = [
        Utterance(f"p{n}", tone(12), duration=9, token_ids=(n, n), language="en") for n in (1, 2, 3)
    ]
    rows = [Utterance("a", tone(1), token_ids=(7,), language="en"), join_parts(tuple(parts), 0.5)]
    options = TargetOptions(buckets=(32,))
    source = TrainingSource(rows, options, np.array([1, 6]), np.zeros(2, bool))
    folder = StateFolder(tmp_path, clip_names("ab"))
    states = load_or_encode(
        [folder], rows, lambda waveforms_BN, _: waveforms_BN[:, :2, None] / 4096
    )
    pairs = zip(
        Loader((source,), MULTILINGUAL, 2).batches(START),
        Loader((source,), MULTILINGUAL, 2, states=states).batches(START),
        strict=False,
    )
    taught = set()
    for (audio, _), (stored, _) in islice(pairs, 4):
        assert facts(stored)[:4] == facts(audio)[:4]
        taught |= set(stored.targets[stored.weights > 0].tolist())
    assert {1, 2, 3, 7} <= taught


def test_the_student_is_given_the_shortest_context_or_a_longer_one(utterances):
    """Clips of 0.01 to 0.11 s need 1 to 6 positions; the same on two hosts and after a restart."""
    contexts = (2, 4, 100)
    whole = loader(utterances, contexts=contexts)
    batches = list(islice(whole.batches(START), 30))
    rows = np.concatenate([batch.rows for batch, _ in batches])
    given = np.concatenate([batch.positions for batch, _ in batches])
    least = np.array([2, 2, 2, 2, 4, 4, 4, 4, 100, 100, 100])[rows]
    assert set(given) == {2, 4, 100, 1500}
    assert (given >= least).all()
    assert 0.35 < (given == least).mean() < 0.65
    assert len(set(given[least == 2])) == 4
    parts = [loader(utterances, contexts=contexts, rank=rank, hosts=2) for rank in (0, 1)]
    halves = [next(islice(part.batches(batches[4][1]), 1))[0].positions for part in parts]
    np.testing.assert_array_equal(np.concatenate(halves), batches[5][0].positions)
    assert next(loader(utterances).batches(START))[0].positions is None


def test_stored_states_are_padded_to_the_longest_of_all_hosts(utterances, tmp_path):
    folder = StateFolder(tmp_path, clip_names(range(SIZE)))

    def encode(waveforms_BN, positions):
        return np.ones((len(waveforms_BN), positions, 1)) * waveforms_BN[:, 100:101, None]

    states = load_or_encode([folder], utterances, encode, contexts=(2, 4, 100))
    make = partial(loader, utterances, states=states, contexts=(2, 4, 100))
    hosts = [make(rank=rank, hosts=2) for rank in (0, 1)]
    sizes = set()
    for pair in islice(zip(*(host.batches(START) for host in hosts), strict=True), 12):
        (one, _), (other, _) = pair
        assert one.audio.shape[1] == other.audio.shape[1]
        longest = max(*one.positions, *other.positions)
        assert one.audio.shape[1] == longest
        sizes.add(longest)
        for audio, positions in zip(one.audio, one.positions, strict=True):
            assert (audio[:positions] != 0).all()
            assert (audio[positions:] == 0).all()
    assert len(sizes) > 1


def test_errors_before_the_first_batch(utterances):
    with pytest.raises(InputError, match="no label to train on"):
        loader([])
    with pytest.raises(InputError, match="batch 4 does not divide over 3 hosts: use 3"):
        loader(utterances, hosts=3)
    long = [replace(utterances[0], token_ids=(7,) * 40)]
    with pytest.raises(InputError, match="has 44 tokens, the longest bucket 32"):
        loader(utterances + long)
    with pytest.raises(InputError, match=r"began on 12 utterances and there are 11"):
        next(loader(utterances).batches(LoaderState(0, 8, 12)))
