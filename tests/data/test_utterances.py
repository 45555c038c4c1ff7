"""Every kind of source gives the same utterances; what is wrong with one is said in a sentence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.audio import load
from flax_distil.audio.container import decoded_frames
from flax_distil.audio.load import AudioError, to_int16
from flax_distil.config import DataConfig
from flax_distil.data.utterances import (
    Concatenated,
    Utterance,
    Utterances,
    UtteranceStream,
    continues,
    load_waveform,
    read_dataset,
)
from flax_distil.errors import InputError

TEXTS = ["one", "two", "three"]


@pytest.fixture
def clips(tmp_path, flac):
    """Three files in audio/, 0.1, 0.2 and 0.3 s long."""
    (tmp_path / "audio").mkdir()
    for number in range(3):
        (tmp_path / "audio" / f"{number}.flac").write_bytes(flac(0.1 * (number + 1)))
    return tmp_path


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, flac, rows=3, **extra) -> str:
    """The convention of the hub: audio as {bytes, path}."""
    audio = [{"bytes": flac(0.1 * (n + 1)), "path": f"{n}.flac"} for n in range(rows)]
    table = pa.table({"audio": audio, "sentence": TEXTS[:rows], **extra})
    pq.write_table(table, path, row_group_size=2)
    return str(path)


def lengths(utterances) -> list[int]:
    return [len(load_waveform(utterance)) for utterance in utterances]


@pytest.mark.parametrize("key", ["audio", "audio_filepath"])
def test_manifest(clips, key):
    rows = [
        {key: f"audio/{n}.flac", "text": TEXTS[n], "duration": 0.1 * (n + 1), "speaker": n}
        for n in range(3)
    ]
    found = read_dataset(lines(clips / "manifest.jsonl", rows))
    assert [utterance.text for utterance in found] == TEXTS
    assert [utterance.id for utterance in found] == [f"audio/{n}.flac" for n in range(3)]
    assert [utterance.speaker for utterance in found] == ["0", "1", "2"]
    assert lengths(found) == [1600, 3200, 4800]
    assert found[-1].duration == pytest.approx(0.3)


def test_segments_of_one_recording(clips, tone):
    rows = [
        {"audio": "audio/2.flac", "offset": offset, "duration": 0.1, "text": "a"}
        for offset in (0.0, 0.1, 0.25, 0.4)
    ]
    found = read_dataset(lines(clips / "manifest.jsonl", rows))
    whole = to_int16(tone(0.3))
    assert np.array_equal(to_int16(load_waveform(found[0])), whole[:1600])
    assert np.array_equal(to_int16(load_waveform(found[1])), whole[1600:3200])
    assert len(load_waveform(found[2])) == 800  # the recording ends
    assert found[1].id == "audio/2.flac@0.1"
    with pytest.raises(AudioError, match=r"starts at 0\.4 s, and the audio ends at 0\.3 s"):
        load_waveform(found[3])
    assert len(load_waveform(found[1], longest=0.05)) == 800


def test_a_clip_s_recording_is_not_decoded_whole(clips, flac, monkeypatch):
    """Clips of two long recordings in turn: seconds of each, not minutes."""
    for name in "ab":
        (clips / f"{name}.flac").write_bytes(flac(60.0))
    rows = [
        {"audio": f"{name}.flac", "offset": offset, "duration": 0.5}
        for offset in (10.0, 30.0, 50.0)
        for name in "ab"
    ]
    seconds = []

    def counted(*arguments):
        for frame in decoded_frames(*arguments):
            seconds.append(frame.samples / frame.rate)
            yield frame

    monkeypatch.setattr(load, "decoded_frames", counted)
    assert lengths(read_dataset(lines(clips / "manifest.jsonl", rows))) == [8000] * 6
    assert sum(seconds) < 6 * 5


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_audiofolder(clips, kind):
    rows = [{"file_name": f"{n}.flac", "transcription": TEXTS[n]} for n in range(3)]
    path = clips / "audio" / f"metadata.{kind}"
    if kind == "jsonl":
        lines(path, rows)
    else:
        path.write_text("file_name,transcription\n0.flac,one\n1.flac,two\n2.flac,three\n")
    found = read_dataset(clips)
    assert [utterance.text for utterance in found] == TEXTS
    assert lengths(found) == [1600, 3200, 4800]


def test_audio_without_references(clips):
    (clips / "audio" / "notes.txt").write_text("not audio")
    found = read_dataset(DataConfig(str(clips), language="de"))
    assert [utterance.id for utterance in found] == [f"audio/{n}.flac" for n in range(3)]
    assert {utterance.text for utterance in found} == {None}
    assert {utterance.language for utterance in found} == {"de"}


def test_parquet_file_folder_and_glob(tmp_path, flac):
    parquet(tmp_path / "b.parquet", flac)
    path = parquet(tmp_path / "a.parquet", flac, 2)
    assert lengths(read_dataset(path)) == [1600, 3200]
    for source in (str(tmp_path), str(tmp_path / "*.parquet")):
        found = read_dataset(source)
        assert [utterance.text for utterance in found] == ["one", "two", *TEXTS]
        assert [found[n].text for n in (4, 0, -1)] == ["three", "one", "three"]
        assert lengths(found) == [1600, 3200, 1600, 3200, 4800]
    assert len(read_dataset(DataConfig(str(tmp_path), limit=4))) == 4


def test_splits_told_by_file_names(tmp_path, flac):
    parquet(tmp_path / "train-00000-of-00002.parquet", flac, 2)
    parquet(tmp_path / "train-00001-of-00002.parquet", flac, 1)
    parquet(tmp_path / "test-00000-of-00001.parquet", flac, 3)
    assert len(read_dataset(DataConfig(str(tmp_path), split="train"))) == 3
    with pytest.raises(InputError, match="has the splits test, train: name one"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="no split dev; it has test, train"):
        read_dataset(DataConfig(str(tmp_path), split="dev"))


def test_split_is_a_folder(clips):
    (clips / "dev").mkdir()
    (clips / "audio" / "0.flac").rename(clips / "dev" / "0.flac")
    assert len(read_dataset(DataConfig(str(clips), split="dev"))) == 1
    with pytest.raises(InputError, match="no split test"):
        read_dataset(DataConfig(str(clips), split="test"))


def test_saved_dataset_and_its_stream(tmp_path, flac, caplog):
    import datasets

    caplog.set_level("INFO")

    table = pq.read_table(parquet(tmp_path / "a.parquet", flac))
    # As the hub has it: a column of type Audio, which would decode through torchcodec.
    saved = datasets.Dataset(table).cast_column("audio", datasets.Audio())
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    found = read_dataset(tmp_path / "saved")
    assert [utterance.text for utterance in found] == TEXTS
    assert lengths(found) == [1600, 3200, 4800]

    stream = saved.to_iterable_dataset(num_shards=2).cast_column(
        "audio", datasets.Audio(decode=False)
    )
    streamed = UtteranceStream(stream, found.columns, DataConfig("stream", limit=3))
    assert [utterance.text for utterance in streamed] == TEXTS
    for _ in range(2):  # a second resume must not start the stream again
        assert [utterance.text for utterance in streamed.iter_from(2)] == ["three"]
    counts = [record.message for record in caplog.records if record.message.startswith("stream: ")]
    after = "stream: 1 row, 1 with text; read from row 2 on"
    assert counts == ["stream: 3 rows, 3 with text", after, after]


def test_named_columns(tmp_path, flac):
    path = parquet(tmp_path / "a.parquet", flac, raw=["x", "y", "z"], locale=["en"] * 3)
    found = read_dataset(DataConfig(path, text_column="raw", language="de"))
    assert [utterance.text for utterance in found] == ["x", "y", "z"]
    assert found[0].language == "en"
    with pytest.raises(InputError, match="no text column words; it has audio, sentence, raw, loc"):
        read_dataset(DataConfig(path, text_column="words"))


def test_joined(tmp_path, flac):
    one = read_dataset(parquet(tmp_path / "a.parquet", flac, 2, token_ids=[[1], [2, 3]]))
    two = read_dataset(parquet(tmp_path / "b.parquet", flac, 3, token_ids=[[], None, [4] * 9]))
    both = Concatenated([one, two])
    assert [utterance.text for utterance in both] == ["one", "two", *TEXTS]
    assert [p.label_lengths().tolist() for p in both.parts] == [[1, 2], [0, -1, 9]]
    assert both[-1].token_ids == (4,) * 9
    assert both[1].token_ids == (2, 3)


def test_who_follows_whom(tmp_path, flac):
    """Same speaker, same chapter, and in a label store numbers without a gap."""
    known = {
        "speaker": ["a", "a", "a", "b", "b", None],
        "chapter_id": ["1", "1", "2", "2", "2", "2"],
        "utterance_number": [0, 1, 2, 3, 5, 6],
    }
    audio = [{"bytes": flac(0.1), "path": None}] * 6
    pq.write_table(pa.table({"audio": audio, **known}), tmp_path / "a.parquet")
    expected = [False, True, False, False, False, False]
    found = read_dataset(tmp_path / "a.parquet")
    assert found.follows().tolist() == expected
    in_turn = [continues(two, one) for one, two in zip([None, *found], found, strict=False)]
    assert in_turn == [False, True, False, False, True, False]  # a stream does not see the gap
    rows = [{"audio": b"", "speaker": None}] * 2
    assert not Utterances(rows, read_columns(rows), DataConfig("rows")).follows().any()
    rows = [{"audio": f, "offset": float(n)} for n, f in enumerate("xxy")]
    assert Utterances(rows, read_columns(rows), DataConfig("rows")).follows().tolist() == [
        False,
        True,
        False,
    ]


def test_label_lengths_without_parquet():
    rows = [{"audio": b"", "token_ids": [1, 2]}, {"audio": b""}]
    found = Utterances(rows, read_columns(rows), DataConfig("rows"))
    assert found.label_lengths().tolist() == [2, -1]


def read_columns(rows):
    from flax_distil.data.sources import Table
    from flax_distil.data.utterances import find_columns

    return find_columns(Table(tuple(rows[0]), rows), DataConfig("rows"))


def test_bytes_need_a_format_where_they_do_not_tell(tone):
    import io

    import av

    file = io.BytesIO()
    with av.open(file, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(to_int16(tone(0.5))[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    rows = [{"audio": {"bytes": file.getvalue(), "path": "en/hello.G722"}}]
    heard = load_waveform(Utterances(rows, read_columns(rows), DataConfig("rows"))[0])
    assert abs(len(heard) - 8000) <= 320


def test_samples_are_their_own_audio(tone):
    assert load_waveform(Utterance("a", tone(0.1))) is not None
    assert np.array_equal(load_waveform(Utterance("a", tone(0.1))), tone(0.1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": "a.wav"}\n{"audio": \n', "manifest.jsonl line 2 is not JSON"),
        ('{"audio": "a.wav"}\n[1]\n', "line 2 must be an object"),
        ("\n", "has no rows"),
        ('{"sound": "a.wav"}\n', "no column that looks like audio.*it has id, sound"),
    ],
)
def test_bad_manifest(tmp_path, content, message):
    path = tmp_path / "manifest.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_dataset(path)


def test_what_is_the_hub_s_is_refused_of_files(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio": "a.wav"}')
    for change in ({"config": "clean"}, {"revision": "main"}, {"streaming": True}):
        (name,) = change
        with pytest.raises(InputError, match=f"is a local dataset and {name} is for the hub"):
            read_dataset(DataConfig(str(path), **change))


@pytest.mark.parametrize(("field", "value"), [("duration", "0:07"), ("offset", -3)])
def test_what_is_no_time_is_one_row_s_fault(tmp_path, field, value):
    rows = [{"audio": "a.wav", field: value}, {"audio": "a.wav", field: float("nan")}]
    found = read_dataset(lines(tmp_path / "manifest.jsonl", rows))
    with pytest.raises(AudioError, match=f"row 0 has {field} {value!r}: it must be seconds"):
        load_waveform(found[0])
    assert (found[1].fault, getattr(found[1], field)) == (None, None)  # pandas' missing value
    assert found.column(field) == [None, None]


def test_bad_sources(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no end")
    (tmp_path / "latin.jsonl").write_bytes(b'{"audio": "a.wav", "text": "caf\xe9"}')
    (tmp_path / "empty").mkdir()
    for source, message in [
        (tmp_path / "absent.jsonl", "no such file or folder"),
        ("absent.parquet", "no such file or folder"),
        ("./absent", "no such file or folder"),
        (tmp_path / "notes.txt", "not a .txt file"),
        (tmp_path / "latin.jsonl", r"latin.jsonl is not UTF-8 text \(line 1, column text\)"),
        (tmp_path / "cut.parquet", "not a complete Parquet file"),
        (tmp_path / "*.arrow", "no file matches"),
        (tmp_path / "empty", "nothing to read"),
    ]:
        with pytest.raises(InputError, match=message):
            read_dataset(str(source))
    pq.write_table(pa.table({"audio": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="without rows"):
        read_dataset(tmp_path / "none.parquet")


def test_a_damaged_row_group_names_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"audio": [np.random.default_rng(n).bytes(5000) for n in range(4)]})
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True)
    changed = bytearray(path.read_bytes())
    changed[2000] ^= 1
    path.write_bytes(bytes(changed))
    found = read_dataset(path)
    assert len(found[3].audio) == 5000
    with pytest.raises(InputError, match=r"a\.parquet is damaged"):
        found[0]


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (FileNotFoundError("no such dataset"), "is neither .*FileNotFoundError"),
        (ConnectionError("not known"), "is not a local file .*hub cannot be reached"),
    ],
)
def test_unknown_hub_name(monkeypatch, raised, words):
    import datasets

    def absent(*_, **__):
        raise raised

    monkeypatch.setattr(datasets, "get_dataset_split_names", absent)
    with pytest.raises(InputError, match=f"nobody/nothing {words}"):
        read_dataset("nobody/nothing")


def test_published_label_sets(tmp_path, flac):
    """As distil-whisper publishes them: labels with their special tokens, prompts as ids."""
    labels = ["<|startoftranscript|><|en|><|0.00|> One.<|0.10|><|endoftext|>", " Two."]
    prompts = pa.array([None, [50361, 1485]], pa.list_(pa.int64()))
    path = parquet(
        tmp_path / "a.parquet", flac, 2, whisper_transcript=labels, condition_on_prev=prompts
    )
    found = read_dataset(path)
    assert [(one.text, one.transcript) for one in found] == list(
        zip(TEXTS[:2], labels, strict=True)
    )
    assert [one.previous for one in found] == [None, (50361, 1485)]
    assert found.columns.transcript == "whisper_transcript"
    assert not found.columns.labelled
    with pytest.raises(InputError, match="whisper_transcript holds a teacher's labels"):
        read_dataset(DataConfig(path, text_column="whisper_transcript"))
    named = read_dataset(DataConfig(path, transcript_column="sentence"))
    assert [(one.text, one.transcript) for one in named] == [(None, "one"), (None, "two")]
    assert read_dataset(parquet(tmp_path / "b.parquet", flac)).columns.transcript is None


def test_previous_text_and_flags(tmp_path):
    rows = [{"audio": "a", "condition_on_prev": before} for before in ("said", True, 0, None)]
    found = Utterances(rows, read_columns(rows), DataConfig("rows"))
    assert [one.previous for one in found] == ["said", None, None, None]


def test_speech_and_ended_are_read(tmp_path, flac):
    flags = {"speech": [True, False, None], "ended": [None, True, False]}
    path = parquet(tmp_path / "a.parquet", flac, **flags)
    found = read_dataset(path)
    assert [one.speech for one in found] == [True, False, True]
    assert [one.text for one in found] == ["one", "", "three"]
    assert [one.ended for one in found] == [True, True, False]
    silent = read_dataset(DataConfig(path, speech=False))
    assert {(one.speech, one.text) for one in silent} == {(False, "")}
    written = read_dataset(lines(tmp_path / "m.jsonl", [{"audio": "a", "speech": "False"}]))
    assert not written[0].speech


def test_empty_text_stays_text():
    rows = [{"audio": "a", "text": ""}, {"audio": "a", "text": None}]
    found = Utterances(rows, read_columns(rows), DataConfig("rows"))
    assert [(one.text, one.speech) for one in found] == [("", True), (None, True)]


def test_a_revision_is_asked_of_the_hub(monkeypatch):
    """Of the names of its splits as well, which may be others than those of the newest one."""
    import datasets

    asked = []
    saved = datasets.Dataset.from_dict({"audio": [b"x"], "text": ["one"]})

    def known(name, *_, revision=None, **__):
        asked.append((name, revision))
        return ["train"]

    def loaded(name, *_, split, revision=None, **__):
        asked.append((name, split, revision))
        return saved

    monkeypatch.setattr(datasets, "get_dataset_split_names", known)
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    for config in (DataConfig("some/set", revision="v1"), DataConfig("some/set@v1")):
        asked.clear()
        assert read_dataset(config)[0].text == "one"
        assert asked == [("some/set", "v1"), ("some/set", "train", "v1")]
