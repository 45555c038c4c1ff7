"""Folders as people and corpora lay them out: every clip once, with its text, of one split."""

import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.config import DataConfig
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.errors import InputError


@pytest.fixture
def folder(tmp_path, flac):
    """`folder({"name": text or bytes or None})`: files, None is a clip."""
    clip = flac(0.1)

    def make(files, at="set"):
        for name, content in files.items():
            path = tmp_path / at / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = clip if content is None else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / at

    return make


def texts(source, **config) -> dict[str, str | None]:
    """Text of each utterance by id; each of them can be opened."""
    found = read_dataset(DataConfig(str(source), **config))
    assert {len(load_waveform(one)) for one in found} == {1600}
    assert len({one.id for one in found}) == len(found)
    return {one.id: one.text for one in found}


def parquet(path, names, flac, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    audio = [{"bytes": flac(0.1), "path": name} for name in names]
    pq.write_table(pa.table({"audio": audio, "text": list(names), **columns}), path)


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_parquet_of_several_splits(tmp_path, flac, names):
    for name in names:
        parquet(tmp_path / name, ["train" if "train" in name else "test"], flac)
    with pytest.raises(InputError, match="has the splits test, train: name one as split"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="has the splits test, train"):
        read_dataset(str(tmp_path / "**" / "*.parquet"))
    for split, name in zip(("train", "test"), names, strict=True):
        assert texts(tmp_path, split=split) == {split: split}
        with pytest.raises(InputError, match="has no split validation"):
            read_dataset(DataConfig(str(tmp_path / name), split="validation"))
    with pytest.raises(InputError, match="has no split validation; it has test, train"):
        read_dataset(DataConfig(str(tmp_path), split="validation"))


def test_folders_of_several_splits(folder):
    clips = folder(
        {
            "train/a.flac": None,
            "train/metadata.csv": "file_name,text\na.flac,one\n",
            "dev/b.flac": None,
            "test-clean/c.flac": None,
        }
    )
    with pytest.raises(InputError, match="has the splits dev, test-clean, train: name one"):
        read_dataset(clips)
    assert texts(clips, split="train") == {"train/a.flac": "one"}
    assert texts(clips, split="validation") == texts(clips, split="dev") == {"dev/b.flac": None}
    assert texts(clips, split="test") == {"test-clean/c.flac": None}


def test_one_list_over_the_folders_of_splits(folder):
    """The list at the top keeps its texts when a split is read."""
    clips = folder(
        {
            "train/a.flac": None,
            "test/b.flac": None,
            "metadata.csv": "file_name,text\ntrain/a.flac,one\ntest/b.flac,two\n",
        }
    )
    assert texts(clips, split="test") == {"test/b.flac": "two"}


def test_lists_called_after_splits(folder):
    rows = {n: json.dumps({"audio_filepath": f"{n}.flac", "text": "x"}) for n in "ab"}
    lists = {f"{n}_manifest.jsonl": row for n, row in rows.items()}
    clips = folder({"a.flac": None, "b.flac": None, "c.flac": None, **lists})
    assert texts(clips) == {"a.flac": "x", "b.flac": "x", "c.flac": None}
    (clips / "a_manifest.jsonl").rename(clips / "train_manifest.jsonl")
    assert texts(clips, split="train") == {"a.flac": "x"}  # and not c.flac, of no split
    (clips / "b_manifest.jsonl").rename(clips / "dev.jsonl")
    with pytest.raises(InputError, match="has the splits dev, train_manifest: name one"):
        read_dataset(clips)


def test_names_that_are_no_split(folder):
    """Names of clips, words that hold others, and parts of one split."""
    names = ("train.flac", "test.flac", "latest/a.flac", "trainers/b.flac")
    assert set(texts(folder(dict.fromkeys(names)))) == set(names)
    both = folder({"train-100/a.flac": None, "train-360/b.flac": None}, "parts")
    assert len(texts(both)) == 2
    assert set(texts(both, split="train-360")) == {"train-360/b.flac"}


# --- lists --------------------------------------------------------------------------------------


def test_metadata_parquet(folder):
    clips = folder({"x/a.flac": None, "x/b.flac": None})
    table = pa.table({"file_name": ["a.flac", "b.flac"], "text": ["one", "two"]})
    pq.write_table(table, clips / "x" / "metadata.parquet")
    assert texts(clips) == {"x/a.flac": "one", "x/b.flac": "two"}
    assert texts(clips / "x" / "metadata.parquet") == {"a.flac": "one", "b.flac": "two"}
    (clips / "x" / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a complete Parquet file"):
        read_dataset(clips)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("transcripts.csv", "file_name,text\nwavs/a.flac,one\nwavs/b.flac,two\n"),
        ("all.tsv", "path\tsentence\na.flac\tone\nb.flac\ttwo\n"),
        (
            "wavs/list.jsonl",
            '{"file_name": "a.flac", "text": "one"}\n{"file": "b.flac", "text": "two"}',
        ),
        ("list.json", '[{"audio": "a", "text": "one"}, {"audio": {"path": "b"}, "text": "two"}]'),
    ],
)
def test_lists_of_any_name(folder, name, content):
    clips = folder({"wavs/a.flac": None, "wavs/b.flac": None, name: content, "config.json": "{}"})
    found = read_dataset(clips)
    assert [utterance.text for utterance in found] == ["one", "two"]
    assert [len(load_waveform(utterance)) for utterance in found] == [1600, 1600]


def test_unlisted_audio_stays_and_is_counted(folder, caplog):
    clips = folder(
        {
            "a/one.flac": None,
            "a/metadata.csv": "file_name,text\none.flac,1\n",
            "b/two.flac": None,
            "b/list.jsonl": '{"audio_path": "two.flac", "transcript": "2", "speaker": "s"}',
            "c/three.flac": None,
        }
    )
    with caplog.at_level(logging.INFO):
        assert texts(clips) == {"a/one.flac": "1", "b/two.flac": "2", "c/three.flac": None}
    assert "3 rows, 2 with text, 1 without; 1 audio files that no list names" in caplog.text
    assert [one.speaker for one in read_dataset(clips)] == [None, "s", None]


def test_two_lists_of_the_same_clips(folder, caplog):
    clips = folder(
        {
            "a.flac": None,
            "metadata.csv": "file_name,text\na.flac,one\n",
            "metadata.jsonl": '{"file_name": "./a.flac", "text": "1", "speaker": "s"}\n',
        }
    )
    with caplog.at_level(logging.INFO):
        (found,) = read_dataset(clips)
    assert (found.text, found.speaker) == ("one", "s")
    assert "1 clips listed twice" in caplog.text
    segments = [{"audio": "a.flac", "offset": at, "duration": 0.1, "text": "x"} for at in (0, 0.05)]
    (clips / "metadata.csv").unlink()
    (clips / "metadata.jsonl").write_text("\n".join(map(json.dumps, segments)))
    assert [one.id for one in read_dataset(clips)] == ["a.flac@0", "a.flac@0.05"]


def test_lists_that_are_none(folder, caplog):
    """An empty list, one whose columns are not known, and a file that is none at all."""
    files = {
        "t/a.txt": "x",
        "README.txt": "x",
        "a.flac": None,
        "metadata.csv": "file_name,text\n",
        "b.csv": "wav,words\na.flac,one\n",
    }
    clips = folder(files)
    with caplog.at_level(logging.INFO):
        assert texts(clips) == {"a.flac": None}
    assert "2 text files not read, such as b.csv" in caplog.text
    assert texts(clips, audio_column="wav", text_column="words") == {"a.flac": "one"}
    with pytest.raises(InputError, match=r"metadata\.csv has no rows"):
        read_dataset(clips / "metadata.csv")
    os.mkfifo(clips / "pipe.jsonl")
    assert len(texts(clips)) == 1


def test_starts_and_ends_of_one_recording_are_clips(folder):
    rows = [{"audio": "a.flac", "start": 0.0, "end": 0.05}, {"audio": "a.flac", "start": 0.05}]
    clips = folder({"a.flac": None, "b.flac": None})
    path = clips / "m.jsonl"
    path.write_text("\n".join(json.dumps(row | {"end": row["start"] + 0.05}) for row in rows))
    found = read_dataset(path)
    assert [len(load_waveform(one)) for one in found] == [800, 800]
    assert [one.id for one in found] == ["a.flac@0.0", "a.flac@0.05"]
    path.write_text(
        '{"audio": "a.flac", "start": 0.0, "end": 0.05}'
    )  # may be of what it was cut from
    assert [len(load_waveform(one)) for one in read_dataset(path)] == [1600]


def test_brackets_are_names(folder, tmp_path, flac):
    clips = folder(
        {"a.flac": None, "list [v2].csv": "file_name,text\na.flac,one\n"}, "talks [2024]"
    )
    assert texts(clips) == texts(clips / "list [v2].csv") == {"a.flac": "one"}
    parquet(tmp_path / "set [1]" / "a.parquet", ["x"], flac)
    parquet(tmp_path / "set [1]" / "b.parquet", ["y"], flac)
    assert texts(tmp_path / "set [1]" / "[ab].parquet") == {"x": "x", "y": "y"}
    assert texts(tmp_path / "talks [2024]" / "*.flac") == {"a.flac": None}
    assert texts(tmp_path / "talks*" / "*.csv") == {"talks [2024]/a.flac": "one"}


def test_relative_paths_start_at_the_file(folder, monkeypatch, tmp_path):
    clips = folder({"audio/a.flac": None, "audio/b.flac": None, "audio/c.flac": None})
    cells = [{"bytes": None, "path": f"audio/{name}.flac"} for name in "ab"]
    pq.write_table(pa.table({"audio": cells, "text": ["1", "2"]}), clips / "a.parquet")
    (clips / "data").mkdir()
    pq.write_table(pa.table({"audio": ["audio/c.flac"]}), clips / "data" / "c.parquet")
    nested = [json.dumps({"audio": {"path": f"audio/{name}.flac"}, "text": name}) for name in "ab"]
    (clips / "list.jsonl").write_text("\n".join(nested))
    monkeypatch.chdir(tmp_path)
    assert texts("set/a.parquet") == {"audio/a.flac": "1", "audio/b.flac": "2"}
    assert texts("set/data/c.parquet") == {"audio/c.flac": None}
    assert texts("set/list.jsonl") == {"audio/a.flac": "a", "audio/b.flac": "b"}


def test_saved_datasets_have_relative_paths_too(folder, tmp_path, caplog):
    import datasets

    clips = folder({"a.flac": None})
    saved = datasets.Dataset.from_dict({"audio": ["a.flac", "a.flac"], "text": ["1", None]})
    saved.save_to_disk(clips)
    with caplog.at_level(logging.INFO):
        found = read_dataset(clips)
    assert [len(load_waveform(one)) for one in found] == [1600] * 2
    assert "2 rows, 1 with text, 1 without" in caplog.text


# --- corpora ------------------------------------------------------------------------------------


def test_librispeech(folder):
    names = [f"84/121123/84-121123-000{n}" for n in range(2)]
    clips = folder(
        {f"dev-clean/{name}.flac": None for name in names}
        | {"dev-clean/84/121123/84-121123.trans.txt": "84-121123-0000 GO DO\n84-121123-0001 I\n"}
        | {"test-clean/61/1/61-1-0000.flac": None, "README.TXT": "x"}
    )
    with pytest.raises(InputError, match="has the splits dev-clean, test-clean"):
        read_dataset(clips)
    found = read_dataset(DataConfig(str(clips), split="dev-clean"))
    assert [one.text for one in found] == ["GO DO", "I"]
    assert {(one.speaker, one.recording) for one in found} == {("84", "84-121123")}
    assert found.follows().tolist() == [False, True]


def test_common_voice(folder):
    head = "client_id\tpath\tsentence\tlocale\n"
    clips = folder(
        {f"clips/{name}.mp3": None for name in "abcd"}
        | {
            "train.tsv": head + 's1\ta.mp3\t"Ja", sagte er.\tde\ns1\tb.mp3\t"Offen\tde\n',
            "test.tsv": head + "s2\tc.mp3\tNein.\tde\n",
            "validated.tsv": head + "s2\tc.mp3\tNein.\tde\n",
            "clip_durations.tsv": "clip\tduration[ms]\na.mp3\t100\n",
        }
    )
    with pytest.raises(InputError, match="has the splits test, train, validated: name one"):
        read_dataset(clips)
    expected = {"a.mp3": '"Ja", sagte er.', "b.mp3": '"Offen'}
    assert texts(clips, split="train") == expected  # and not d.mp3, which is of no list
    assert texts(clips / "train.tsv") == expected
    assert read_dataset(clips / "train.tsv")[0].language == "de"


def test_ljspeech(folder):
    clips = folder(
        {
            "wavs/LJ001-0001.wav": None,
            "wavs/LJ001-0002.wav": None,
            "metadata.csv": 'LJ001-0001|In 1455, "so"|In fourteen\nLJ001-0002|b|b\n',
            "README": "x",
        }
    )
    assert texts(clips) == {"LJ001-0001": 'In 1455, "so"', "LJ001-0002": "b"}


def test_texts_beside_audio(folder):
    clips = folder(
        {
            "a.wav": None,
            "a.txt": "\ufeffone\n",
            "deep/b.flac": None,
            "deep/b.normalized.txt": "two",
            "c.flac": None,
            "notes.txt": "three",
            "d.flac": None,
            "d.json": '{"id": "x", "wav": "d", "text": "four", "speaker": "s"}',
        }
    )
    expected = {"a.wav": "one", "c.flac": None, "d.flac": "four", "deep/b.flac": "two"}
    assert texts(clips) == expected
    (clips / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"c\.txt is not UTF-8 text"):
        read_dataset(clips)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["WAV", "aif", "au", "caf", "m4b", "3gp", "mp2", "ts", "mpga", "w64", "opus", "wma"]
)
def test_suffixes_of_audio(folder, suffix):
    """What they hold does not matter here: FFmpeg reads it."""
    assert texts(folder({f"a.{suffix}": None})) == {f"a.{suffix}": None}


def test_what_systems_hide_is_no_clip(folder):
    files = ("a.flac", "._a.flac", ".cache/b.flac", "__MACOSX/c.flac")
    assert texts(folder(dict.fromkeys(files))) == {"a.flac": None}


def test_links_are_followed_once(folder):
    clips = folder({"a.flac": None})
    other = folder({"b.flac": None}, "elsewhere")
    (clips / "linked").symlink_to(other)
    (other / "back").symlink_to(clips)
    assert texts(clips) == {"a.flac": None, "linked/b.flac": None}


def test_names_that_no_file_can_hold(folder, tmp_path):
    """Opened by their bytes, written down escaped."""
    clips = folder({"a\nb.flac": None, "10:30.flac": None})
    os.rename(clips / "10:30.flac", os.path.join(os.fsencode(clips), b"latin-\xe9.flac"))
    found = read_dataset(clips)
    assert [one.id for one in found] == [r"a\nb.flac", r"latin-\udce9.flac"]
    assert [len(load_waveform(one)) for one in found] == [1600] * 2
    (clips / "metadata.csv").write_bytes(b"file_name,text\nlatin-\xe9.flac,one\n")
    assert texts(clips) == {r"latin-\udce9.flac": "one", r"a\nb.flac": None}


def test_a_list_without_texts_and_texts_beside_its_files(folder, monkeypatch):
    """Parquet of something else is not in the way."""
    clips = folder(
        {
            "wavs/a.flac": None,
            "wavs/a.txt": "one",
            "wavs/b.flac": None,
            "m.jsonl": '{"audio": "wavs/a.flac", "duration": 1}\n{"audio": "wavs/b.flac"}\n',
        }
    )
    pq.write_table(pa.table({"word": ["x"]}), clips / "words.parquet")
    monkeypatch.chdir(clips.parent)
    assert texts("set") == {"wavs/a.flac": "one", "wavs/b.flac": None}
    assert texts(clips) == texts("set")


def test_audio_beside_parquet_is_counted(folder, flac, caplog):
    clips = folder({"a.flac": None})
    parquet(clips / "a.parquet", ["x", "y"], flac)
    with caplog.at_level(logging.INFO):
        assert len(texts(clips)) == 2
    assert "1 audio files beside the Parquet files not read" in caplog.text


def test_label_stores_are_parquet_alone(folder, flac):
    """What lies beside their shards is never taken for a list."""
    store = folder({"skipped.jsonl": '{"file": "a", "text": "x"}'})
    parquet(store / "data" / "00000.parquet", ["x"], flac, token_ids=[[1, 2]])
    found = read_dataset(store)
    assert found.columns.labelled
    assert found.label_lengths().tolist() == [2]
    assert np.isclose(len(found), 1)
