"""The same real clips in every form that datasets come in, read back: rows, texts, ids, speakers,
languages, seconds and samples."""

import gzip
import json
import logging
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.audio.load import encode_flac, to_int16
from flax_distil.config import DataConfig
from flax_distil.data.paths import matching
from flax_distil.data.utterances import UtteranceStream, load_waveform, read_dataset
from flax_distil.errors import InputError


class Clip(NamedTuple):
    name: str
    samples: np.ndarray
    flac: bytes
    text: str
    speaker: str
    language: str
    seconds: float


@pytest.fixture(scope="module")
def clips(human_clips) -> list[Clip]:
    """Three short ones of speaker 84, with an accent, a comma and quotes in their texts."""
    shortest = sorted(human_clips, key=lambda clip: len(clip[0]))[:3]
    found = []
    for number, (waveform, text) in enumerate(shortest):
        text = f"“É”, {text}"
        name = f"84-1-000{number}"
        seconds = len(waveform) / 16_000
        found.append(
            Clip(name, to_int16(waveform), encode_flac(waveform), text, "84", "en", seconds)
        )
    return found


def put(folder: str | Path, files: dict[str, str | bytes]) -> str:
    """Files in a folder on disk or, by URL, in memory."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    return str(folder)


def audio(clips, at="", suffix="flac") -> dict[str, bytes]:
    return {f"{at}{clip.name}.{suffix}": clip.flac for clip in clips}


def rows(clips, column="audio", at="", **changes) -> list[dict]:
    return [
        {
            column: f"{at}{clip.name}.flac",
            "text": clip.text,
            "speaker": clip.speaker,
            "language": clip.language,
            "duration": clip.seconds,
        }
        | changes
        for clip in clips
    ]


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter) -> str:
    quote = lambda cell: '"' + str(cell).replace('"', '""') + '"' if delimiter == "," else str(cell)
    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(delimiter.join(map(quote, line)) + "\n" for line in lines)


def tar(samples: dict[str, bytes | str]) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in samples.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return file.getvalue()


def tar_of(clips, cells=True) -> bytes:
    members: dict[str, bytes | str] = {}
    for clip, row in zip(clips, rows(clips, place="here", bytes=0), strict=True):
        members[f"{clip.name}.flac"] = clip.flac
        members[f"{clip.name}.{'json' if cells else 'txt'}"] = (
            json.dumps(row) if cells else clip.text
        )
    return tar(members)


def cut(clip: Clip, path: str) -> dict:
    """As Lhotse 1.33 writes it (`lhotse cut simple`)."""
    size, seconds = len(clip.samples), clip.seconds
    supervision = {"id": clip.name, "recording_id": clip.name, "start": 0.0, "duration": seconds}
    supervision |= {"channel": 0, "text": clip.text, "language": clip.language}
    source = {"type": "file", "channels": [0], "source": path}
    recording = {"id": clip.name, "sources": [source], "sampling_rate": 16_000}
    recording |= {"num_samples": size, "duration": seconds, "channel_ids": [0]}
    return {
        "id": f"{clip.name}-0",
        "start": 0,
        "duration": seconds,
        "channel": 0,
        "supervisions": [supervision | {"speaker": clip.speaker}],
        "recording": recording,
        "type": "MonoCut",
    }


def parquet(clips) -> bytes:
    cells = [{"bytes": clip.flac, "path": f"{clip.name}.flac"} for clip in clips]
    known = pa.Table.from_pylist(rows(clips)).drop_columns("audio")
    file = BytesIO()
    pq.write_table(known.append_column("audio", pa.array(cells)), file)
    return file.getvalue()


def kaldi(clips, folder: str, data="") -> dict[str, str]:
    pairs = lambda name: "".join(f"{clip.name} {getattr(clip, name)}\n" for clip in clips)
    return {
        f"{data}wav.scp": "".join(f"{clip.name} {folder}{clip.name}.flac\n" for clip in clips),
        f"{data}text": pairs("text"),
        f"{data}utt2spk": pairs("speaker"),
        f"{data}utt2lang": pairs("language"),
        f"{data}utt2dur": pairs("seconds"),
    }


def saved(clips, folder, splits=()) -> str:
    import datasets

    cells = [{"bytes": clip.flac, "path": f"{clip.name}.flac"} for clip in clips]
    whole = [row | {"audio": cell} for row, cell in zip(rows(clips), cells, strict=True)]
    if splits:
        parts = {
            name: datasets.Dataset.from_list([row]) for name, row in zip(splits, whole, strict=True)
        }
        datasets.DatasetDict(parts).save_to_disk(folder)
    else:
        datasets.Dataset.from_list(whole).save_to_disk(folder)
    return str(folder)


def split_folders(clips, folder):
    files = {}
    for name, clip in zip(("train", "dev", "test"), clips, strict=True):
        files |= audio([clip], f"{name}/") | {f"{name}/metadata.jsonl": jsonl(rows([clip]))}
    return put(folder, files)


SPEAKER, LANGUAGE, SECONDS = "speaker", "language", "seconds"
ALL = {SPEAKER, LANGUAGE, SECONDS}
NAME, FILE = "{}", "{}.flac"

# By name: a writer of the clips that returns the source; the ids; what else it tells; options.
FORMS: dict[str, tuple[Callable[[list[Clip], Any], str], str | None, set[str], dict]] = {
    "jsonl": (
        lambda c, f: put(f, audio(c) | {"m.jsonl": jsonl(rows(c))}) + "/m.jsonl",
        FILE,
        ALL,
        {},
    ),
    "nemo": (
        lambda c, f: put(f, audio(c) | {"m.json": jsonl(rows(c, "audio_filepath"))}) + "/m.json",
        FILE,
        ALL,
        {},
    ),
    "jsonl.gz": (
        lambda c, f: (
            put(f, audio(c) | {"m.jsonl.gz": gzip.compress(jsonl(rows(c)).encode())})
            + "/m.jsonl.gz"
        ),
        FILE,
        ALL,
        {},
    ),
    "csv": (
        lambda c, f: put(f, audio(c) | {"m.csv": table(rows(c, "path"), ",")}) + "/m.csv",
        FILE,
        ALL,
        {},
    ),
    "tsv": (
        lambda c, f: put(f, audio(c) | {"m.tsv": table(rows(c, "path"), "\t")}) + "/m.tsv",
        FILE,
        ALL,
        {},
    ),
    "audiofolder": (
        lambda c, f: put(f, audio(c) | {"metadata.csv": table(rows(c, "file_name"), ",")}),
        FILE,
        ALL,
        {},
    ),
    "ljspeech": (
        lambda c, f: put(
            f,
            audio(c, "wavs/", "wav")
            | {"metadata.csv": "".join(f"{one.name}|{one.text}|{one.text.lower()}\n" for one in c)},
        ),
        NAME,
        set(),
        {},
    ),
    "librispeech": (
        lambda c, f: put(
            f,
            audio(c, "dev-clean/84/1/")
            | {"dev-clean/84/1/84-1.trans.txt": "".join(f"{one.name} {one.text}\n" for one in c)},
        ),
        "dev-clean/84/1/{}.flac",
        {SPEAKER},
        {},
    ),
    "common-voice": (
        lambda c, f: put(
            f,
            audio(c, "clips/", "mp3")
            | {
                "validated.tsv": "client_id\tpath\tsentence\tlocale\n"
                + "".join(f"84\t{one.name}.mp3\t{one.text}\ten\n" for one in c),
                "clip_durations.tsv": "clip\tduration[ms]\n84-1-0000.mp3\t7\n",
            },
        ),
        "{}.mp3",
        {SPEAKER, LANGUAGE},
        {"split": "validated"},
    ),
    "text-beside": (
        lambda c, f: put(f, audio(c) | {f"{one.name}.txt": one.text + "\n" for one in c}),
        FILE,
        set(),
        {},
    ),
    "json-beside": (
        lambda c, f: put(
            f, audio(c) | {f"{o.name}.json": json.dumps(r) for o, r in zip(c, rows(c), strict=True)}
        ),
        FILE,
        ALL,
        {},
    ),
    "kaldi": (
        lambda c, f: put(f, audio(c, "corpus/") | kaldi(c, "corpus/", "data/all/")),
        NAME,
        ALL,
        {},
    ),
    "kaldi-absolute": (
        lambda c, f: put(f, audio(c) | kaldi(c, f"{f}/")) + "/wav.scp",
        NAME,
        ALL,
        {},
    ),
    "lhotse": (
        lambda c, f: (
            put(
                f,
                audio(c)
                | {
                    "cuts.jsonl.gz": gzip.compress(
                        jsonl([cut(one, f"{f}/{one.name}.flac") for one in c]).encode()
                    )
                },
            )
            + "/cuts.jsonl.gz"
        ),
        NAME,
        ALL,
        {},
    ),
    "tar-txt": (lambda c, f: put(f, {"a.tar": tar_of(c, cells=False)}) + "/a.tar", NAME, set(), {}),
    "tar-json": (
        lambda c, f: (
            put(f, {"a-000.tar": tar_of(c[:2]), "a-001.tar": tar_of(c[2:])}) + "/a-{000..001}.tar"
        ),
        NAME,
        ALL,
        {},
    ),
    "tar-stream": (
        lambda c, f: put(f, {"a-000.tar": tar_of(c[:2]), "a-001.tar": tar_of(c[2:])}) + "/a-*.tar",
        NAME,
        ALL,
        {"streaming": True},
    ),
    "parquet": (lambda c, f: put(f, {"a.parquet": parquet(c)}) + "/*.parquet", FILE, ALL, {}),
    "save_to_disk": (lambda c, f: saved(c, f"{f}/saved"), FILE, ALL, {}),
    "save_to_disk-splits": (
        lambda c, f: saved(c, f"{f}/saved", ("train", "dev", "test")),
        FILE,
        ALL,
        {"split": "train+dev+test"},
    ),
    "folder-splits": (split_folders, None, ALL, {"split": "dev+test+train"}),
}
REMOTE = set(FORMS) - {"save_to_disk", "save_to_disk-splits"}


@pytest.mark.parametrize(
    ("form", "remote"),
    [(form, False) for form in FORMS] + [(form, True) for form in sorted(REMOTE)],
)
def test_every_form_gives_the_same_utterances(form, remote, clips, tmp_path, caplog):
    write, ids, told, options = FORMS[form]
    source = write(clips, f"memory://{form}" if remote else tmp_path)
    with caplog.at_level(logging.INFO):
        found = read_dataset(DataConfig(source, **options))
        by_text = {one.text: one for one in found.iter_from(0)}
    assert len(by_text) == len(clips)
    assert "3 rows, 3 with text" in caplog.text
    for clip in clips:
        one = by_text[clip.text]
        assert ids is None or one.id == ids.format(clip.name)
        assert one.speaker == (clip.speaker if SPEAKER in told else None)
        assert one.language == (clip.language if LANGUAGE in told else None)
        assert one.duration == (pytest.approx(clip.seconds) if SECONDS in told else None)
        assert np.array_equal(to_int16(load_waveform(one)), clip.samples)


def test_texts_that_only_some_samples_of_a_tar_have(clips, tmp_path, caplog):
    """In a stream too, where they must be beside the audio; other members do not matter."""
    one, two, _ = clips
    members = {f"d/{one.name}.FLAC": one.flac, f"d/{two.name}.flac": two.flac}
    members |= {f"d/{two.name}.txt": two.text, f"d/{two.name}.npy": b"\x93", "d/x.txt": "lost"}
    put(tmp_path, {"train-000.tar": tar(members), "test-000.tar": tar({})})
    for streaming in (False, True):
        config = DataConfig(str(tmp_path), split="train", streaming=streaming)
        with caplog.at_level(logging.INFO):
            found = read_dataset(config)
            texts = {one.id: one.text for one in found.iter_from(0)}
        assert texts == {f"d/{one.name}": None, f"d/{two.name}": two.text}
        assert "2 rows, 1 with text, 1 without" in caplog.messages[-1]
        assert ("1 texts are not read" if streaming else "1 members of tars without") in caplog.text
        caplog.clear()
    with pytest.raises(InputError, match="has the splits test-000, train-000"):
        read_dataset(tmp_path)
    apart = put(tmp_path, {"b.tar": tar({"a.flac": one.flac, "b.flac": two.flac, "a.txt": "a"})})
    assert [one.text for one in read_dataset(f"{apart}/b.tar")] == ["a", None]


def test_a_tar_is_a_shard_of_a_stream(clips, tmp_path):
    source = put(tmp_path, {f"a-{n}.tar": tar_of([clip]) for n, clip in enumerate(clips)})
    stream = read_dataset(DataConfig(f"{source}/a-{{0..2}}.tar", streaming=True))
    assert isinstance(stream, UtteranceStream)
    assert stream.shards == 3
    assert [one.text for one in stream.shard(1)] == [clips[1].text]
    assert [one.text for one in stream.iter_from(2)] == [clips[2].text]


def test_segments_of_kaldi_and_supervisions_of_lhotse(clips, tmp_path):
    first, second, _ = clips
    joined = encode_flac(np.concatenate([first.samples, second.samples]) / np.float32(32_768))
    start, end = first.seconds, first.seconds + second.seconds
    source = put(
        tmp_path,
        {
            "r.flac": joined,
            "wav.scp": f"r {tmp_path}/r.flac\n",
            "segments": f"a r 0 {start}\nb\tr\t{start} -1\n",
            "text": "a one\nb two\n",
        },
    )
    whole = cut(first, f"{tmp_path}/r.flac")
    whole |= {"duration": end, "recording": whole["recording"] | {"id": "r", "duration": end}}
    parts = [("a", 0.0, start, "one"), ("b", start, second.seconds, "two")]
    whole["supervisions"] = [
        {"id": name, "start": at, "duration": seconds, "text": text}
        for name, at, seconds, text in parts
    ]
    put(tmp_path / "lhotse", {"cuts.jsonl": jsonl([whole])})
    for found in (read_dataset(source + "/wav.scp"), read_dataset(tmp_path / "lhotse")):
        assert [(one.id, one.text, one.recording) for one in found] == [
            ("a", "one", "r"),
            ("b", "two", "r"),
        ]
        for one, clip in zip(found, clips, strict=False):
            assert np.array_equal(to_int16(load_waveform(one)), clip.samples)


@pytest.mark.parametrize("command", ["flac -c -d -s {} |", "/k/sph2pipe -f wav -p {} |", "cat {}|"])
def test_commands_of_kaldi_that_only_decode(clips, tmp_path, command):
    """The file is opened, and nothing is run."""
    scp = "".join(f"{one.name} {command.format(f'{one.name}.flac')}\n" for one in clips)
    found = read_dataset(put(tmp_path, audio(clips) | {"wav.scp": scp}))
    assert [one.id for one in found] == [clip.name for clip in clips]
    assert np.array_equal(to_int16(load_waveform(found[0])), clips[0].samples)


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (
            {"wav.scp": "a sox a.sph -t wav - speed 2 |\n"},
            "",
            r"line 1: a is a command .* wav-copy",
        ),
        ({"wav.scp": "a raw.ark:17\n"}, "/wav.scp", r"line 1: a is a command or an archive"),
        ({"wav.scp": "a a.wav\n", "segments": "s b 0 1\n"}, "", "segments line 1 is not “s rec"),
        (
            {"c.jsonl": '{"id": "m", "tracks": [], "type": "MixedCut"}'},
            "/c.jsonl",
            "line 1 is a MixedCut that is not a part of one audio file.*save_audios",
        ),
        (
            {
                "c.jsonl": '{"type": "MonoCut", "supervisions": [], "recording": {"channel_ids": '
                '[0, 1], "sources": [{"type": "file", "source": "a.wav"}]}}'
            },
            "/c.jsonl",
            "line 1 is a MonoCut that is .* one channel of several: write its audio",
        ),
        (
            {"s.jsonl": '{"id": "m", "recording_id": "r", "start": 0, "channel": 0}'},
            "/s.jsonl",
            "of a Lhotse manifest of recordings or supervisions: join them to cuts",
        ),
        ({"a.tar": b"\x1f\x8b" + b"x" * 600}, "/a.tar", "not a complete uncompressed tar"),
        ({"a.tar": tar({"a.flac": b"x" * 2000})[:1500]}, "/a.tar", "not a complete uncompressed"),
        ({"a.tar": tar({"a.flac": b"", "a.txt": b"\xe9"})}, "", "a.txt is not UTF-8 text"),
        ({"a.tar.gz": b""}, "/a.tar.gz", "not a .gz file"),
        ({"train.csv": "file_name,text\na.wav,x\n"}, "", "it has train"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(tmp_path, files, source, message):
    config = DataConfig(
        put(tmp_path, files) + source, split="train+test" if "train" in message else None
    )
    with pytest.raises(InputError, match=message):
        read_dataset(config)


def test_urls_that_cannot_be_opened():
    for source, message in [
        (
            "nowhere://bucket/m.jsonl",
            "cannot open nowhere://bucket/m.jsonl .*install the file system",
        ),
        ("memory://absent/m.jsonl", "no such file or folder"),
        ("memory:/absent/*.tar", "no file matches"),
    ]:
        with pytest.raises(InputError, match=message):
            read_dataset(source)


def test_a_label_store_in_a_bucket(clips):
    """As `distill --labels` names it: a path with one slash."""
    cells = [{"bytes": clip.flac, "path": None} for clip in clips]
    file = BytesIO()
    pq.write_table(pa.table({"audio": cells, "token_ids": [[1], [], [1, 2]]}), file)
    shards = {"data/00000.parquet": file.getvalue(), "skipped.jsonl": '{"file": "a"}'}
    put("memory://store", shards | {"labels.json": "{}", "README.md": "x"})
    found = read_dataset(Path("memory://store"))
    assert found.columns.labelled
    assert found.label_lengths().tolist() == [1, 0, 2]
    assert np.array_equal(to_int16(load_waveform(found[2])), clips[2].samples)


def test_patterns_of_numbers(tmp_path):
    put(tmp_path, {f"a-{n:03}.tar": b"" for n in (8, 9, 10, 11)})
    files, root = matching(f"{tmp_path}/a-{{009..010}}.tar")
    assert (root, [Path(file).name for file in files]) == (
        str(tmp_path),
        ["a-009.tar", "a-010.tar"],
    )


def test_splits_of_the_hub(monkeypatch):
    """`train+test` of a dataset that is downloaded, and of a stream."""
    import datasets

    part = datasets.Dataset.from_dict({"audio": [b"x"], "text": ["one"]})
    loaded = lambda name, config, split, streaming, revision: (
        part.to_iterable_dataset() if streaming else part.map(lambda row: {"text": split})
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    found = read_dataset(DataConfig("some/set", split="train+test"))
    assert [one.text for one in found.iter_from(0)] == ["train", "test"]
    stream = read_dataset(DataConfig("some/set", split="train+test", streaming=True))
    assert len(list(stream.iter_from(0))) == 2
    with pytest.raises(InputError, match=r"several splits: name one of train, test, or several"):
        read_dataset(DataConfig("some/set"))
