"""Audio states on disk: made once, made further after a kill, found by the clips' names."""

import fcntl

import ml_dtypes
import numpy as np
import pytest

from flax_distil.data import audio_states as module
from flax_distil.data.audio_states import StateFolder, clip_names, load_or_encode, write_states
from flax_distil.data.utterances import Utterance
from flax_distil.data.windows import join_parts
from flax_distil.errors import InputError

SHAPE = (3, 4)
VALUES = np.arange(1, 6, dtype=np.float32) / 64


def clips(count: int) -> list[Utterance]:
    return [Utterance(str(n), np.full(1600, VALUES[n], np.float32)) for n in range(count)]


def names(count: int) -> np.ndarray:
    return clip_names(range(count), map(str, range(count)))


@pytest.fixture
def folder(tmp_path) -> StateFolder:
    return StateFolder(tmp_path / "states", names(5))


class Encoder:
    """Writes each clip's first sample all over its states, and breaks after some calls."""

    def __init__(self, breaks_after: int = 99):
        self.calls, self.breaks_after = 0, breaks_after

    def __call__(self, waveforms, positions=None):
        if self.calls == self.breaks_after:
            raise KeyboardInterrupt
        self.calls += 1
        if positions is not None:
            assert waveforms.shape[1] == 320 * (positions + 1)
        shape = SHAPE if positions is None else (positions, 4)
        return np.broadcast_to(waveforms[:, :1, None] / 32768, (len(waveforms), *shape))


def test_every_clip_once_and_again_from_disk(folder):
    for encoder in (Encoder(), Encoder(breaks_after=0)):
        kept = load_or_encode([folder], clips(5), encoder, batch_size=2)
        found = kept.read([4, 0, 1])
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[:, 2, 3].astype(np.float32), VALUES[[4, 0, 1]])
        np.testing.assert_allclose([clip.seconds for (clip,) in kept.clips], 0.1)


def test_goes_on_after_a_kill(folder, monkeypatch):
    monkeypatch.setattr(module, "FILE_CLIPS", 2)
    with pytest.raises(KeyboardInterrupt):
        load_or_encode([folder], clips(5), Encoder(2), batch_size=1)
    (folder.path / ".half.safetensors.1.partial").write_bytes(b"{")
    rest = Encoder()
    with (folder.path / ".busy.safetensors.1.partial").open("wb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        kept = load_or_encode([folder], clips(5), rest, batch_size=1)
    assert rest.calls == 3
    left = [path.name for path in folder.path.glob(".*")]
    assert left == [".busy.safetensors.1.partial"]  # of a process that is writing it
    np.testing.assert_array_equal(kept.read(range(5))[:, 0, 0].astype(np.float32), VALUES)


def test_clips_that_were_dropped_change_nothing_and_new_ones_are_added(folder):
    """Someone wrote 0, 2 and 4; of these 2 and 4 are wanted, and 0 and 1 of another dataset."""
    states = [np.full(SHAPE, value, ml_dtypes.bfloat16) for value in VALUES[[0, 2, 4]]]
    write_states(folder.path / "00000.safetensors", folder.names[[0, 2, 4]], [1, 2, 3], states)
    chosen = StateFolder(folder.path, folder.names[[2, 4]])
    other = StateFolder(folder.path.with_name("other"), names(2))
    encoder = Encoder()
    kept = load_or_encode([chosen, other], [*clips(5)[2::2], *clips(2)], encoder, batch_size=2)
    assert encoder.calls == 1
    expected = VALUES[[2, 4, 0, 1]]
    np.testing.assert_array_equal(kept.read(range(4))[:, 0, 0].astype(np.float32), expected)
    np.testing.assert_allclose([clip.seconds for (clip,) in kept.clips], [2, 3, 0.1, 0.1])


def test_int8_is_half_as_large_and_near_in_every_channel(folder):
    """Half a step of 127 of its loudest, and bfloat16 before and behind, 1/256 each."""
    random = np.random.default_rng(0)
    states_NSD = (random.normal(size=(5, 50, 8)) * 10.0 ** np.arange(-4, 4)).astype(np.float32)
    narrow = list(states_NSD.astype(ml_dtypes.bfloat16))
    sizes = {}
    for stored in ("bfloat16", "int8"):
        there = StateFolder(folder.path / stored, folder.names)
        write_states(there.path / "0.safetensors", there.names, [0.1] * 5, narrow, stored)
        kept = load_or_encode([there], clips(5), Encoder(0))
        sizes[stored] = (there.path / "0.safetensors").stat().st_size
        away = np.abs(kept.read(range(5)).astype(np.float32) - states_NSD)
        loudest = np.abs(states_NSD).max(axis=1, keepdims=True)
        assert (away <= loudest / (84 if stored == "int8" else 256)).all()
    assert sizes["int8"] < 0.7 * sizes["bfloat16"]  # of small clips: steps and names count


def test_a_short_clip_has_the_states_of_a_short_context(folder):
    """0.1 s of five clips are 5 positions; a clip of 1 s needs more than the contexts have."""
    utterances = clips(5)
    utterances[3] = Utterance("3", np.full(16_000, VALUES[3], np.float32))
    for encoder in (Encoder(), Encoder(breaks_after=0)):
        kept = load_or_encode([folder], utterances, encoder, batch_size=2, contexts=(4, 6, 49))
        assert [clip.positions for (clip,) in kept.clips] == [6, 6, 6, 3, 6]
        padded = kept.clip(1).read(longest=8).astype(np.float32)
        np.testing.assert_array_equal(padded[:, 0], [VALUES[1]] * 6 + [0] * 2)


def test_a_damaged_file_is_named(folder):
    load_or_encode([folder], clips(5), Encoder())
    (file,) = folder.path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{file.name} is damaged .*delete it"):
        load_or_encode([folder], clips(5), Encoder())


def test_a_window_that_grows_keeps_the_states_of_all_its_parts(folder):
    """Three parts of 12 s, whose durations in the dataset are 9 s, need two clips of 30 s."""
    parts = [
        Utterance(str(n), np.full(192_000, VALUES[n], np.float32), duration=9) for n in (1, 2, 3)
    ]
    utterances = [clips(1)[0], join_parts(tuple(parts), pause=0.5), *clips(5)[2:]]
    for encoder in (Encoder(), Encoder(breaks_after=0)):
        kept = load_or_encode([folder], utterances, encoder, batch_size=4)
        turns = [kept.clip(1, turn) for turn in range(3)]
        assert [clip.seconds for clip in turns] == [24.5, 12, 24.5]
        np.testing.assert_array_equal(
            [clip.parts for clip in turns[:2]], [[12, 12, np.nan], [np.nan, np.nan, 12]]
        )
        read = kept.read([0, 1, 1, 1, 2], [5, 0, 1, 2, 7])[:, 0, 0].astype(np.float32)
        np.testing.assert_array_equal(read, VALUES[[0, 1, 3, 1, 2]])


def test_a_clip_that_cannot_be_heard_has_no_seconds(tmp_path):
    utterances = [*clips(1), Utterance("bad", b"nothing")]
    kept = load_or_encode([StateFolder(tmp_path, names(2))], utterances, Encoder())
    np.testing.assert_allclose([clip.seconds for (clip,) in kept.clips], [0.1, 0])
