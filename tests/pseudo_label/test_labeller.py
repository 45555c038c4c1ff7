"""Labelling with a teacher whose answers are known: order, skips, restarts, `kill -9`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jiwer
import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_teacher import clip, fake_labeller, fake_teacher, idle_teacher, label_with

from flax_distil.audio.load import load_audio, to_int16
from flax_distil.config import DataConfig
from flax_distil.data.audio_states import StateFolder, clip_names, load_or_encode
from flax_distil.data.utterances import UtteranceStream, load_waveform, read_dataset
from flax_distil.errors import InputError
from flax_distil.pseudo_label.labeller import label, summary_table
from flax_distil.pseudo_label.store import LabelStore
from flax_distil.pseudo_label.teacher import Explained


def rows(folder: Path) -> list[dict]:
    return [
        row
        for path in sorted((folder / "data").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_labels(config):
    summary = label_with(config)
    found = rows(config.output_dir)
    numbers = [n for n in range(23) if n not in (5, 13)]
    assert [row["id"] for row in found] == [f"{n}.flac" for n in numbers]
    assert [row["whisper_transcript"] for row in found] == [f" clip number {n}" for n in numbers]
    assert found[8]["token_ids"] == [1, 2, 9]
    assert found[8]["reference"] == "Clip number 9!"
    assert found[8]["speaker"] == "s0"
    assert found[8]["language"] == "en"
    assert found[8]["wer"] == 0.0
    assert found[8]["reference_words"] == 3
    assert found[8]["duration"] == pytest.approx(0.1)
    assert found[8]["mean_log_probability"] == pytest.approx(-0.9)
    heard = to_int16(load_audio(found[8]["audio"]["bytes"]))
    assert np.array_equal(heard, to_int16(load_audio(clip(9))))
    assert found[6]["id"] == "7.flac"
    assert (found[6]["reference"], found[6]["wer"], found[6]["word_errors"]) == (None,) * 3

    assert summary.labels == 21
    assert summary.wer == 0.0
    assert summary.seconds == pytest.approx(2.1)
    assert [one.id for one in summary.skipped] == ["5.flac", "13.flac"]
    skipped = json_lines(config.output_dir / "skipped.jsonl")
    assert [one["id"] for one in skipped] == ["5.flac", "13.flac"]
    assert "no such audio file" in skipped[1]["reason"]
    assert summary_table(summary, "labels").row_count == 7


def test_wer_is_jiwers_after_the_normaliser(config):
    texts = iter(["Mr. Clip number 9", "hello hello", "", "5 clips"] * 10)

    def forgetful(waveforms, language):
        hypotheses = fake_teacher(waveforms, language)
        return [dataclasses.replace(one, text=next(texts)) for one in hypotheses]

    config = dataclasses.replace(config, batch_size=1)
    label_with(config, forgetful)
    from whisper.normalizers import EnglishTextNormalizer

    normalize = EnglishTextNormalizer()
    judged = [row for row in rows(config.output_dir) if row["reference"]]
    pairs = [(normalize(row["reference"]), normalize(row["whisper_transcript"])) for row in judged]
    assert [row["wer"] for row in judged] == [jiwer.wer(*pair) for pair in pairs]
    assert len({row["wer"] for row in judged}) > 2


def test_an_empty_reference_has_no_wer(config, speech):
    (speech / "manifest.jsonl").write_text('{"audio": "1.flac", "text": "(...)"}\n')
    label_with(config)
    (row,) = rows(config.output_dir)
    assert (row["reference"], row["wer"], row["reference_words"]) == ("(...)", None, 0)
    assert (row["error_rate"], row["speech"]) == ("WER", True)


def test_whether_a_label_ended_is_kept(config):
    def cut(waveforms, language):
        found = fake_teacher(waveforms, language)
        return [dataclasses.replace(one, ended=one.tokens[2] % 2 == 0) for one in found]

    label_with(config, cut)
    assert [row["ended"] for row in rows(config.output_dir)] == [
        n % 2 == 0 for n in range(23) if n not in (5, 13)
    ]


def test_clips_without_speech_are_kept_beside_what_was_made_up(config, speech):
    manifest = speech / "manifest.jsonl"
    listed = [{"audio": f"{n}.flac", "text": text} for n, text in enumerate(["One", "", " \n"])]
    listed.append({"audio": "3.flac", "text": "Clip number 3", "speech": False})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in listed))
    summary = label_with(config)
    found = rows(config.output_dir)
    assert [row["speech"] for row in found] == [True, False, False, False]
    assert found[1]["whisper_transcript"] == " clip number 1"
    assert found[1]["reference"] == ""
    assert [row["word_errors"] for row in found[1:]] == [None] * 3
    assert (summary.labels, summary.reference_words) == (4, 1)

    noise = dataclasses.replace(config.data, speech=False)
    label_with(dataclasses.replace(config, data=noise, output_dir=speech / "noise"))
    assert not any(row["speech"] for row in rows(speech / "noise"))


def test_windows_keep_what_their_parts_are_and_where_the_errors_fall(config, speech):
    listed = [{"audio": f"{n}.flac", "text": f"Clip number {n}."} for n in range(3)]
    manifest = speech / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in listed))

    def teacher(waveforms, language):
        text = " Clip number 0. Clip number none, thank you. Clip number 2."
        return [dataclasses.replace(one, text=text) for one in fake_teacher(waveforms, language)]

    label_with(dataclasses.replace(config, pack_seconds=30.0), teacher)
    (row,) = rows(config.output_dir)
    assert row["part_references"] == [
        "Clip number 0.",
        "Clip number 1.",
        "Clip number 2.",
    ]
    assert (row["part_words"], row["part_errors"]) == ([3, 3, 3], [0, 3, 0])
    assert (row["reference_words"], row["word_errors"]) == (9, 3)
    label_with(dataclasses.replace(config, output_dir=speech / "single"))
    assert {row["part_words"] for row in rows(speech / "single")} == {None}


def test_a_window_that_grows_past_30_s_is_labelled_in_two(config, speech):
    """Three clips of 11 s that claim 5 s, and one that is damaged: every clip has its label."""
    listed = []
    for number in range(3):
        (speech / f"{number}.flac").write_bytes(clip(number, 11.0))
        listed.append({"audio": f"{number}.flac", "text": f"Clip {number}.", "duration": 5.0})
    listed.insert(1, {"audio": "5.flac", "text": "Clip 5.", "duration": 5.0})
    (speech / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    summary = label_with(dataclasses.replace(config, pack_seconds=30.0))
    found = rows(config.output_dir)
    assert [row["reference"] for row in found] == [
        "Clip 0. Clip 1.",
        "Clip 2.",
    ]
    assert [row["duration"] for row in found] == [22 + config.pack_pause, 11.0]
    assert [row["utterance_number"] for row in found] == [0, 0]
    assert [row["token_ids"][2] for row in found] == [0, 2]
    assert len({row["id"] for row in found}) == 2
    assert (summary.labels, summary.skipped) == (2, ())
    assert label_with(dataclasses.replace(config, pack_seconds=30.0)).labels == 2  # it goes on


def test_languages_without_spaces_are_compared_by_characters(config, speech):
    reference, label = "今天天气很好", "今天天汽很好"
    listed = [
        {"audio": "1.flac", "text": reference, "language": "zh"},
        {"audio": "2.flac", "text": "Clip number 2", "language": "de"},
    ]
    manifest = speech / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in listed))

    def teacher(waveforms, language):
        found = fake_teacher(waveforms, language)
        return [dataclasses.replace(one, text=label) if language == "zh" else one for one in found]

    summary = label_with(config, teacher)
    chinese, german = rows(config.output_dir)
    assert (chinese["error_rate"], chinese["reference_words"], chinese["word_errors"]) == (
        *("CER", 6, 1),
    )
    assert (german["error_rate"], german["reference_words"]) == ("WER", 3)
    assert summary.rate == "WER/CER"
    assert summary_table(summary, "").columns[0]._cells[2] == "WER/CER against the references"
    by_words = dataclasses.replace(config, error_rate="wer", output_dir=speech / "words")
    label_with(by_words, teacher)
    assert rows(by_words.output_dir)[0]["wer"] == 1.0


def test_where_each_utterance_stood_is_kept(config, speech):
    listed = json_lines(speech / "manifest.jsonl")
    for n, row in enumerate(listed):
        row["chapter_id"] = n // 10
    (speech / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    label_with(config)
    found = rows(config.output_dir)
    assert [row["utterance_number"] for row in found] == [n for n in range(23) if n not in (5, 13)]
    assert [row["recording"] for row in found] == [
        str(row["utterance_number"] // 10) for row in found
    ]


def test_the_teacher_gets_full_batches_of_one_language(config, speech):
    listed = json_lines(speech / "manifest.jsonl")
    for n, row in enumerate(listed):
        row["language"] = ["English", "de", None][n % 3]
    (speech / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    asked = []

    def teacher(waveforms, language):
        asked.append((waveforms.shape, waveforms.dtype, language))
        return fake_teacher(waveforms, language)

    config = dataclasses.replace(config, shard_size=12)
    label_with(config, teacher)
    assert {shape for shape, _, _ in asked} == {(3, 480_000)}
    assert {str(dtype) for _, dtype, _ in asked} == {"int16"}
    assert {language for _, _, language in asked} == {"en", "de", None}
    found = rows(config.output_dir)
    assert [row["id"] for row in found] == [f"{n}.flac" for n in range(23) if n not in (5, 13)]
    assert [row["language"] for row in found[:3]] == ["en", "de", "en"]


def test_kill_at_any_moment_and_go_on(speech, tmp_path):
    """The shards, the index and the list of skips are those of a run that was left alone."""
    program = [sys.executable, str(Path(__file__).with_name("fake_teacher.py"))]
    manifest = str(speech / "manifest.jsonl")

    def labelled(name: str, kills: int) -> list[list[str]]:
        command = [*program, manifest, str(tmp_path / name), str(kills)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [line.split() for line in done.stdout.splitlines()]

    assert labelled("whole", 0) == [["0", "23"]]
    endings = labelled("killed", 20)
    killed_at = [shards for code, shards in endings if code == "-9"]
    assert endings[-1] == ["0", "23"]
    # A fast machine may be done before the last kills; most hit the work, at one place or another.
    assert len(killed_at) >= 12
    assert len(set(killed_at)) >= 6
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert killed == whole  # with nothing beside it


@pytest.mark.parametrize("damage", ["cut", "flip", "flip, not verified", "remove", "remove index"])
def test_a_damaged_shard_is_made_again(config, damage):
    label_with(config)
    whole = contents(config.output_dir)
    shard = config.output_dir / "data" / "00002.parquet"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-20])
    elif damage.startswith("flip"):
        changed = bytearray(shard.read_bytes())
        changed[200] ^= 1
        shard.write_bytes(bytes(changed))
    elif damage == "remove":
        shard.unlink()
    if damage == "remove index":
        (config.output_dir / "shards.json").unlink()
    asked = []

    def teacher(waveforms, language):
        asked.append(len(waveforms))
        return fake_teacher(waveforms, language)

    summary = label_with(dataclasses.replace(config, verify=damage == "flip"), teacher)
    # Shard 2 has four clips: one batch of 3 and one filled up to 3.
    assert asked == ([3, 3] if damage in ("cut", "flip", "remove") else [])
    assert summary.labels == 21
    assert summary.wer == 0.0
    assert (contents(config.output_dir) == whole) == (damage != "flip, not verified")


def test_states_are_there_before_their_shard(config, monkeypatch, tmp_path):
    """Stopped between the two, the shard is made again and its states are not written twice."""
    states = tmp_path / "states"

    def hearing(waveforms, language):
        for hypothesis in fake_teacher(waveforms, language):
            audio = np.full((1, 2), hypothesis.tokens[2], ml_dtypes.bfloat16)
            yield Explained(**vars(hypothesis), audio_SD=audio)

    def killed(self, number, *_):
        assert len(list(states.iterdir())) == number + 1
        if number == 2:
            raise KeyboardInterrupt
        return write(self, number, *_)

    write = LabelStore.write
    monkeypatch.setattr(LabelStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        label_with(config, hearing, states)
    monkeypatch.undo()
    label_with(config, hearing, states)
    labels = read_dataset(config.output_dir)
    names = clip_names(
        *map(labels.column, ("utterance_number", "id", "duration", "mean_log_probability"))
    )
    kept = load_or_encode(
        [StateFolder(states, names)], labels, encode=lambda _: pytest.fail("encoded")
    )
    expected = [n for n in range(23) if n not in (5, 13)]
    assert kept.read(range(21))[:, 0, 1].tolist() == expected
    np.testing.assert_allclose([clip.seconds for (clip,) in kept.clips], 0.1)


def test_a_finished_run_does_nothing(config):
    first = label_with(config)
    again = label_with(config, idle_teacher)
    assert (again.labels, again.seconds, again.skipped) == (21, first.seconds, first.skipped)
    assert again.rtf is None
    assert summary_table(again, "labels").row_count == 6


def test_a_stream_goes_on_where_it_stopped(config, speech):
    listed = read_dataset(config.data)
    stream = UtteranceStream(list(listed.rows), listed.columns, config.data)
    label_with(config)

    streamed = dataclasses.replace(config, output_dir=config.output_dir.with_name("streamed"))
    left = iter([True] * 4)

    def label_stream(teacher):
        labeller = fake_labeller(streamed, teacher, utterances=stream)
        return label(labeller.job, labeller.shards)

    def dying(waveforms, language):
        next(left)
        return fake_teacher(waveforms, language)

    with pytest.raises((StopIteration, RuntimeError)):
        label_stream(dying)
    store = LabelStore(streamed.output_dir, {})
    assert len(store.finished()) == 2
    label_stream(fake_teacher)
    shards = {name: data for name, data in contents(config.output_dir).items() if "data/" in name}
    assert shards == {n: d for n, d in contents(streamed.output_dir).items() if "data/" in n}
    assert store.complete()
    assert label_stream(idle_teacher).labels == 21


def test_audio_by_reference(config, speech):
    config = dataclasses.replace(config, store_audio="reference")
    label_with(config)
    found = rows(config.output_dir)
    assert found[0]["audio"] == {"bytes": None, "path": str(speech / "0.flac")}
    assert len(read_dataset(config.output_dir)) == 21


def test_a_store_of_references_is_read_from_anywhere(config, speech, monkeypatch):
    """Relative names are absolute in the store; what Parquet cannot hold is skipped."""
    odd = os.fsencode(speech / "odd-") + b"\xe9.flac"
    Path(os.fsdecode(odd)).write_bytes((speech / "0.flac").read_bytes())
    (speech / "manifest.jsonl").write_bytes(
        b'{"audio": "0.flac"}\n{"audio": "odd-\xe9.flac"}\n{"audio": "1.flac"}\n'
    )
    monkeypatch.chdir(speech)
    data = dataclasses.replace(config.data, source="manifest.jsonl")
    summary = label_with(dataclasses.replace(config, store_audio="reference", data=data))
    assert summary.labels == 2
    assert [one.id for one in summary.skipped] == [r"odd-\udce9.flac"]
    monkeypatch.chdir("/")
    assert all(len(load_waveform(one)) for one in read_dataset(config.output_dir))


def test_a_part_of_a_recording_cannot_be_referred_to(config, speech):
    (speech / "manifest.jsonl").write_text('{"audio": "1.flac", "offset": 0.02}\n')
    with pytest.raises(InputError, match=r"1\.flac@0\.02 is not a file of its own"):
        label_with(dataclasses.replace(config, store_audio="reference"))


def test_other_settings_are_named(config):
    label_with(config)
    other = dataclasses.replace(
        config, max_tokens=100, data=dataclasses.replace(config.data, limit=9), batch_size=7
    )
    with pytest.raises(InputError) as error:
        label_with(other)
    assert "data.limit was None and is 9; max_tokens was 224 and is 100; utterances was 23 " in str(
        error.value
    )
    assert "batch_size" not in str(error.value)


def test_a_folder_of_something_else_is_left_alone(config):
    config.output_dir.mkdir()
    (config.output_dir / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and not a label store"):
        label_with(config)


def test_a_file_is_no_folder(config):
    config.output_dir.write_text("mine")
    for folder in (config.output_dir, config.output_dir / "labels"):
        with pytest.raises(InputError, match=r"cannot write to .*labels: choose"):
            label_with(dataclasses.replace(config, output_dir=folder))


def test_run_refuses_what_cannot_work(config):
    from flax_distil.pseudo_label import run

    with pytest.raises(InputError, match="batch_size is 0: use 1 or more"):
        run(dataclasses.replace(config, batch_size=0))
    with pytest.raises(InputError, match="no such file or folder"):
        run(dataclasses.replace(config, data=DataConfig("absent.jsonl")))


def test_a_whisper_from_the_command_line(config, speech, random_folders, capsys):
    """The stored tokens are what the recogniser says of the same windows."""
    from flax_distil.audio.load import pad_or_trim
    from flax_distil.cli import main
    from flax_distil.decode.recognizer import make_recognizer, recognize
    from flax_distil.model.checkpoint import load_checkpoint
    from flax_distil.options import DecodeOptions

    teacher, _ = random_folders
    command = f"pseudo-label {config.data.source} --model {teacher} --output-dir "
    command += f"{config.output_dir} --limit 7 --batch-size 2 --shard-size 4 --max-tokens 6"
    assert main(command.split()) == 0
    assert "WER against the references" in capsys.readouterr().out
    found = rows(config.output_dir)
    assert [row["id"] for row in found] == [f"{n}.flac" for n in (0, 1, 2, 3, 4, 6)]
    waveforms = np.stack(
        [pad_or_trim(to_int16(load_audio(speech / row["id"]))) for row in found[:2]]
    )
    recognizer = make_recognizer(load_checkpoint(teacher))
    expected = recognize(recognizer, waveforms, DecodeOptions(max_tokens=6, timestamps=True))
    assert [tuple(row["token_ids"]) for row in found[:2]] == [one.tokens for one in expected]
    assert all(row["token_ids"] for row in found)

    assert not any(row["ended"] for row in found)  # it never learned to end

    assert main([*command.split(), "--no-timestamps"]) == 2
    assert "timestamps was True and is False" in capsys.readouterr().err
