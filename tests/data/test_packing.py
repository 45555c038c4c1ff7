"""Windows of several utterances: who shares one, what they say and how they sound."""

import json
from itertools import islice

import numpy as np
import pytest
from test_batches import BEGIN, MULTILINGUAL

from flax_distil.audio.load import SAMPLE_RATE, audio_duration, to_int16
from flax_distil.config import TrainingDataConfig
from flax_distil.data import windows as module
from flax_distil.data.audio_states import StateFolder, clip_names, load_or_encode
from flax_distil.data.batches import TargetOptions
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import open_source
from flax_distil.data.utterances import Utterance, load_waveform, read_dataset
from flax_distil.data.windows import clip_seconds, decode_clip, pack
from flax_distil.errors import InputError

CLIPS = [("a", 1.0), ("b", 2.0), ("a", 1.5), ("a", 0.5), ("b", 1.0), ("a", 4.0)]


@pytest.fixture
def manifest(tmp_path, flac):
    rows = []
    for number, (speaker, seconds) in enumerate(CLIPS):
        (tmp_path / f"{number}.flac").write_bytes(flac(seconds))
        row = {"audio_filepath": f"{number}.flac", "text": f"word{number}", "speaker": speaker}
        rows.append(row | ({"duration": seconds} if number % 2 else {}))
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_speaker_in_order_up_to_the_limit(manifest):
    windows = pack(read_dataset(manifest), seconds=3.25, pause=0.25)
    # a: 1.0 + 0.25 + 1.5 leaves 0.5: no room for 0.25 + 0.5. b: 2.0 + 0.25 + 1.0 fits exactly.
    # 4.0 s is longer than any window and stays alone.
    assert list(windows.groups) == [(0, 2), (1, 4), (3,), (5,)]
    assert [window.text for window in windows] == ["word0 word2", "word1 word4", "word3", "word5"]
    assert windows[1].speaker == "b"
    assert windows[0].duration == pytest.approx(2.75)
    assert [window.id for window in windows.iter_from(2)] == [windows[2].id, windows[3].id]


def test_sounds_like_its_parts(manifest):
    utterances = read_dataset(manifest)
    whole = decode_clip(pack(utterances, seconds=30, pause=0.25)[0])
    silence = np.zeros(SAMPLE_RATE // 4, np.float32)
    parts = [load_waveform(utterances[row]) for row in (0, 2, 3, 5)]
    expected = np.concatenate([p for part in parts for p in (silence, part)][1:])
    np.testing.assert_array_equal(whole.samples, to_int16(expected))


def test_every_clip_has_a_window_whatever_the_pause(manifest):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["duration"] = 0.0
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = pack(read_dataset(manifest), seconds=30, pause=0.0)
    assert list(windows.groups) == [(0, 2, 3, 5), (1, 4)]
    with pytest.raises(InputError, match="pack_pause is -1 s: it must not be negative"):
        pack(read_dataset(manifest), seconds=30, pause=-1.0)


def test_a_clip_that_cannot_be_read_stays_alone(manifest):
    (manifest.parent / "2.flac").write_bytes(b"no audio")
    windows = pack(read_dataset(manifest), seconds=30, pause=0.25)
    assert (2,) in windows.groups


def test_no_window_is_longer_than_the_encoder_s(manifest):
    with pytest.raises(InputError, match="pack_seconds is 31: a window has at most 30 s"):
        pack(read_dataset(manifest), seconds=31, pause=0.25)


def test_what_a_dataset_tells_is_not_read_from_its_audio(manifest, monkeypatch):
    """With durations, windows are planned from columns: no row with its sound is touched."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = [row | {"duration": seconds} for row, (_, seconds) in zip(rows, CLIPS, strict=True)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    utterances = read_dataset(manifest)
    monkeypatch.setattr(module, "audio_duration", lambda *_: pytest.fail("a header is read"))
    monkeypatch.setattr(type(utterances), "__getitem__", lambda *_: pytest.fail("a row is read"))
    windows = pack(utterances, seconds=3.25, pause=0.25)
    assert list(windows.groups) == [(0, 2), (1, 4), (3,), (5,)]


def test_headers_are_read_once(manifest, monkeypatch, tmp_path):
    """What was read is found again, also by another process; not for other data."""
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "HEADERS_CACHED", 1)
    read = []

    def counted(source, *arguments):
        read.append(source)
        return audio_duration(source, *arguments)

    monkeypatch.setattr(module, "audio_duration", counted)
    first = pack(read_dataset(manifest), seconds=3.25, pause=0.25)
    assert len(read) == 3  # every second clip has a duration
    assert [window.duration for window in first] == [2.75, 3.25, 0.5, 4.0]
    assert len(read) == 3
    again = pack(read_dataset(manifest), seconds=3.25, pause=0.25)
    assert again.groups == first.groups
    assert len(read) == 3
    rows = manifest.read_text().replace("4.flac", "0.flac")
    manifest.write_text(rows)
    other = pack(read_dataset(manifest), seconds=3.25, pause=0.25)
    assert len(read) == 6
    assert other.seconds.tolist() == [1.0, 2.0, 1.5, 0.5, 1.0, 4.0]


def test_lengths_of_samples_and_of_parts(flac):
    assert clip_seconds(Utterance("a", np.zeros(8000, np.float32))) == 0.5
    assert clip_seconds(Utterance("a", flac(2.0), offset=0.5)) == 1.5
    assert clip_seconds(Utterance("a", flac(2.0), offset=2.5), unknown=30.0) == 30.0


def test_a_window_keeps_to_its_recording(manifest):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["recording"] = "early" if number < 3 else "late"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = pack(read_dataset(manifest), seconds=30, pause=0.25)
    assert list(windows.groups) == [(0, 2), (1,), (3, 5), (4,)]
    assert [window.recording for window in windows] == ["early", "early", "late", "late"]


SPOKEN = [  # seconds, pitch, label; 0.02 s a timestamp
    (1.0, 400, [7]),
    (0.7, 800, [BEGIN + 5, 8, BEGIN + 30]),
    (1.3, 1600, [BEGIN, 9, BEGIN + 20, BEGIN + 40, 10, BEGIN + 65]),
    (2.0, 600, [11]),
    (1.0, 1200, [12]),
]


@pytest.fixture
def spoken(tmp_path, flac):
    """One speaker's clips of known length, pitch and label."""
    return spoken_as(tmp_path, flac, [{}] * len(SPOKEN))


def spoken_as(tmp_path, flac, told):
    """The clips with what a manifest tells of each."""
    lines = []
    for number, (seconds, hertz, label) in enumerate(SPOKEN):
        (tmp_path / f"{number}.flac").write_bytes(flac(seconds, hertz))
        row = {"audio": f"{number}.flac", "speaker": "s", "language": "en", "token_ids": label}
        row |= told[number]
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "spoken.jsonl").write_text("".join(lines))
    return TrainingDataConfig(str(tmp_path / "spoken.jsonl"), pack_seconds=4.0, pack_pause=0.5)


def batch_of(config, size=32, **options):
    options = TargetOptions(buckets=(32,), **options)
    (source,) = open_source(config, options, MULTILINGUAL)
    ((batch, _),) = islice(Loader((source,), MULTILINGUAL, size).batches(LoaderState(3)), 1)
    return batch


def test_windows_in_training_have_the_times_of_what_sounds(spoken):
    """Two windows: 0–1, 1.5–2.2, 2.7–4 s, and 0–2, 2.5–3.5 s; the pitch between two timestamps is
    that of the clip whose label stands there."""
    batch = batch_of(spoken, timestamp_probability=1.0)
    first = [BEGIN, 7, BEGIN + 50, BEGIN + 80, 8, BEGIN + 105]
    first += [BEGIN + 135, 9, BEGIN + 155, BEGIN + 175, 10, BEGIN + 200]
    second = [BEGIN, 11, BEGIN + 100, BEGIN + 125, 12, BEGIN + 175]
    pitch = {label[-2] if label[-1] >= BEGIN else label[-1]: hertz for _, hertz, label in SPOKEN}
    for row, tokens in zip(batch.rows, batch.tokens.tolist(), strict=True):
        wanted = [first, second][row]
        assert tokens[3 : 4 + len(wanted)] == [*wanted, MULTILINGUAL.eot]
    for row, label in ((0, first), (1, second)):
        samples = batch.waveforms[batch.rows.tolist().index(row)]
        for start, word, end in zip(label[::3], label[1::3], label[2::3], strict=True):
            seconds = [(time - BEGIN) * 0.02 for time in (start, end)]
            piece = samples[slice(*(round(one * SAMPLE_RATE) for one in seconds))].astype(float)
            heard = np.abs(np.fft.rfft(piece)).argmax() * SAMPLE_RATE / len(piece)
            assert heard == pytest.approx(pitch.get(word, 1600), abs=3)


def test_times_are_the_sound_s_and_not_the_manifest_s(tmp_path, flac):
    """A manifest that rounds durations to half seconds plans the same windows."""
    rounded = [{"duration": seconds} for seconds in (1.0, 0.5, 1.5, 2.0, 1.0)]
    batches = [
        batch_of(spoken_as(tmp_path, flac, told), timestamp_probability=1.0)
        for told in ([{}] * 5, rounded)
    ]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    np.testing.assert_array_equal(batches[0].waveforms, batches[1].waveforms)


def test_audio_states_keep_the_times_of_their_sound(tmp_path, flac):
    """Labels beside states are those beside sound, though the manifest's durations are not; a part
    that cannot be decoded is in neither."""
    told = [{"duration": seconds} for seconds in (1.0, 0.5, 1.5, 2.0, 1.0)]
    config = spoken_as(tmp_path, flac, told)
    (tmp_path / "4.flac").write_bytes(b"no audio")
    options = TargetOptions(buckets=(32,), timestamp_probability=1.0)
    (source,) = open_source(config, options, MULTILINGUAL)
    folder = StateFolder(tmp_path / "states", clip_names(range(len(source.utterances))))
    encode = lambda waveforms, _: np.zeros((len(waveforms), 2, 2), np.float32)
    loaders = [Loader((source,), MULTILINGUAL, 4)]
    for _ in range(2):  # encoded now, and from disk
        states = load_or_encode([folder], source.utterances, encode, batch_size=2)
        loaders.append(Loader((source,), MULTILINGUAL, 4, states=states))
    batches = [next(iter(loader.batches(LoaderState(3))))[0] for loader in loaders]
    for batch in batches[1:]:
        np.testing.assert_array_equal(batch.tokens, batches[0].tokens)
        np.testing.assert_array_equal(batch.seconds, batches[0].seconds)
    assert sorted(set(batches[0].seconds.tolist())) == [2.0, 4.0]


def test_a_window_that_grows_is_learnt_in_turns(tmp_path, flac):
    """Three clips of 11 s that claim 5 s: two in one pass, the third in the next."""
    lines = []
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(flac(11.0, 400.0 + number))
        row = {"audio": f"{number}.flac", "speaker": "s", "token_ids": [7 + number]}
        lines.append(json.dumps(row | {"language": "en", "duration": 5.0}) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(lines))
    config = TrainingDataConfig(str(tmp_path / "long.jsonl"), pack_seconds=30.0, pack_pause=0.5)
    batch = batch_of(config, size=2, timestamp_probability=0.0)
    learnt = [[token for token in row if token in (7, 8, 9)] for row in batch.tokens.tolist()]
    assert learnt == [[7, 8], [9]]
    assert batch.seconds.tolist() == [22.5, 11.0]
    assert (batch.weights.sum(axis=1) > 0).all()


def test_a_window_is_read_with_the_one_before(spoken):
    options = {"timestamp_probability": 0.0, "prompt_probability": 0.2}
    batch = batch_of(spoken, 120, **options)
    prompted = batch.tokens[:, 0] == MULTILINGUAL.previous
    assert not prompted[batch.rows == 0].any()
    assert abs(prompted[batch.rows == 1].mean() - 0.2) < 0.18  # 60 throws, 3.5 deviations
    tokens = batch.tokens[prompted][0].tolist()
    assert tokens[:6] == [MULTILINGUAL.previous, 7, 8, 9, 10, MULTILINGUAL.sot]
    assert not batch.weights[prompted][:, :5].any()
    assert batch.weights[prompted][:, 5:8].all()  # language, task and no-timestamps
    assert batch.targets[prompted][0, 8:11].tolist() == [11, 12, MULTILINGUAL.eot]
    assert (batch.weights[prompted].sum(axis=1) == 6).all()
