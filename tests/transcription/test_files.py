"""Audio in any form to transcripts, one or many."""

import io
import json
import tracemalloc
from dataclasses import fields, replace

import numpy as np
import pytest

from flax_distil.audio.load import SAMPLE_RATE, encode_flac
from flax_distil.config import TranscribeConfig
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.errors import InputError, SomeFailed
from flax_distil.model.checkpoint import load_checkpoint, save_checkpoint
from flax_distil.options import DecodeOptions
from flax_distil.transcription import (
    ChunkedOptions,
    Segment,
    SequentialOptions,
    Transcript,
    chunked,
    run,
    sequential,
    transcribe,
    transcribe_all,
)
from flax_distil.transcription.files import check_flags, target_paths

SHORT = DecodeOptions(max_tokens=6)


@pytest.fixture(scope="module")
def recognizer(random_folders):
    return make_recognizer(load_checkpoint(random_folders[0]))


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.float32(0.3 * np.sin(2 * np.pi * 220 * time * (1 + time / 10)))


def test_files_bytes_and_arrays_are_alike(recognizer, tmp_path):
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(1)))
    long_form = SequentialOptions((0.0,), no_speech_threshold=None)
    from_file = transcribe(tmp_path / "a.flac", recognizer, options=SHORT, long_form=long_form)
    assert from_file.segments
    again = transcribe(encode_flac(tone(1)), recognizer, options=SHORT, long_form=long_form)
    assert again == from_file


def test_silence_between_chunks_is_no_segment(recognizer):
    sound = np.concatenate([tone(5), np.zeros(20 * SAMPLE_RATE, np.float32), tone(5)])
    found = transcribe(sound, recognizer, options=SHORT, long_form=ChunkedOptions(10, 1))
    assert len(found.segments) == 2
    assert all(segment.text for segment in found.segments)


@pytest.mark.parametrize("long_form", [SequentialOptions((0.0,)), ChunkedOptions()])
@pytest.mark.parametrize("samples", [0, 100, 800, 20 * SAMPLE_RATE, 65 * SAMPLE_RATE])
def test_silence_has_no_text(recognizer, long_form, samples):
    silence = np.zeros(samples, np.float32)
    found = transcribe(silence, recognizer, options=SHORT, long_form=long_form)
    assert found.text == ""
    assert found.language == "en"


@pytest.mark.parametrize("long_form", [SequentialOptions((0.0,)), ChunkedOptions()])
def test_hours_of_silence_cost_neither_time_nor_memory(recognizer, long_form, monkeypatch):
    """Three hours, of which nothing is given to the model."""
    for module in (chunked, sequential):
        monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("silence is decoded"))
    silence = np.zeros(3 * 3600 * SAMPLE_RATE, np.float32)
    tracemalloc.start()
    found = [*transcribe_all(recognizer, [silence], SHORT, long_form)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[-1][2].text == ""
    assert sum(seconds for _, seconds, _ in found) == pytest.approx(3 * 3600)
    assert peak < 4 * 80 * 4 * 100 * 3 * 3600  # a few log-mels; the waveform is twice one


@pytest.mark.parametrize("long_form", [SequentialOptions((0.0,)), ChunkedOptions()])
def test_a_twentieth_of_a_second_is_enough(recognizer, long_form):
    found = transcribe(tone(0.05), recognizer, options=SHORT, long_form=long_form)
    assert all(segment.end <= 0.05 or segment.tokens for segment in found.segments)


@pytest.mark.parametrize(
    ("audio", "complaint"),
    [
        (np.full(100, np.nan, np.float32), "100 samples are NaN"),
        (np.zeros((2, 100), np.float32), "one channel"),
        (np.zeros(100, np.int16), "int16"),
    ],
)
def test_a_wrong_waveform_is_refused(recognizer, audio, complaint):
    with pytest.raises(InputError, match=complaint):
        transcribe(audio, recognizer)


@pytest.mark.parametrize("long_form", [SequentialOptions(), ChunkedOptions()])
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (dict(language="englisch"), 'did you mean "english"'),
        (dict(language="de"), "English-only checkpoint cannot transcribe German"),
        (dict(task="translate"), "English-only checkpoint cannot translate"),
        (dict(options=DecodeOptions(task="translate")), "English-only checkpoint cannot translate"),
        (dict(options=DecodeOptions(beams=10**6)), "1000000 texts for each of 8 windows need"),
        (dict(options=DecodeOptions(hotwords="word " * 300)), "hotwords have 300 tokens: .* 223"),
        (dict(options=DecodeOptions(prefix="word " * 300)), "prefix has 30[01] tokens"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    recognizer, long_form, arguments, complaint, monkeypatch
):
    for module in (chunked, sequential):
        monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("it begins"))
    with pytest.raises(InputError, match=complaint):
        transcribe(tone(1), recognizer, long_form=long_form, **arguments)


def test_more_draws_than_memory_are_refused(recognizer):
    options = DecodeOptions(best_of=10**6)
    with pytest.raises(InputError, match="1000000 texts for each of 8 windows need"):
        transcribe(tone(1), recognizer, options=options)


def test_a_long_prompt_is_cut_and_said(recognizer, caplog):
    long_form = SequentialOptions((0.0,))
    transcribe(tone(1), recognizer, options=SHORT, prompt="word " * 300, long_form=long_form)
    assert "the prompt has 300 tokens: its last 223 are used" in caplog.text


def config(sources, model, **options) -> TranscribeConfig:
    """`options` by the names of their flags."""
    quick: dict = dict(max_tokens=6)
    if options.get("method") != "chunked":
        quick |= dict(temperatures=(0.0,), no_speech_threshold=None)
    return with_flags(TranscribeConfig(tuple(sources), str(model)), **quick | options)


def with_flags(config: TranscribeConfig, **flags) -> TranscribeConfig:
    for flag, value in flags.items():
        parts = {part.name: getattr(config, part.name) for part in fields(config)}
        if flag in parts:
            config = replace(config, **{flag: value})
            continue
        field = flag.removeprefix("vad_")
        name, part = next(one for one in parts.items() if hasattr(one[1], field))
        config = replace(config, **{name: replace(part, **{field: value})})
    return config


def test_a_bad_file_does_not_stop_the_good_ones(random_folders, tmp_path, capsys):
    for name in ("a.flac", "c.flac"):
        (tmp_path / name).write_bytes(encode_flac(tone(0.5)))
    (tmp_path / "b.flac").write_bytes(b"no audio")
    files = [tmp_path / f"{name}.flac" for name in ("a", "b", "c", "none")]
    with pytest.raises(SomeFailed, match=r"2 of 4 files(.|\n)*b\.flac(.|\n)*none\.flac"):
        run(config(files, random_folders[1], format="json", output_dir=tmp_path / "texts"))
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["a.json", "c.json"]
    written = json.loads((tmp_path / "texts" / "a.json").read_text())
    assert written["text"].strip() in capsys.readouterr().out
    assert set(written) == {"text", "segments", "language"}
    assert set(written["segments"][0]) == set(Segment.__dataclass_fields__) - {"words"}


def test_a_student_without_timestamps_is_read_in_chunks(random_folders, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(0.5)))
    student = load_checkpoint(random_folders[1])
    save_checkpoint(
        replace(student, generation=student.generation | {"trained_with_timestamps": False}),
        tmp_path / "student",
    )
    auto = TranscribeConfig((tmp_path / "a.flac",), str(tmp_path / "student"))
    asked = with_flags(auto, method="sequential", temperatures=(0.0,), no_speech_threshold=None)
    for stage, timed, said in (
        (auto, False, "--method chunked is used"),
        (asked, True, "without timestamps, which the sequential method needs"),
    ):
        (path,) = run(with_flags(stage, format="json", output_dir=tmp_path, max_tokens=6))
        segments = json.loads(path.read_text())["segments"]
        assert segments
        assert any(token > 50_362 for one in segments for token in one["tokens"]) is timed
        assert said in caplog.text
        caplog.clear()


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_an_assistant_is_reported(random_folders, tmp_path, caplog, method):
    caplog.set_level("INFO")
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(0.5)))
    options = dict(
        output_dir=tmp_path, method=method, assistant=str(random_folders[1]), draft_tokens=2
    )
    run(config([tmp_path / "a.flac"], random_folders[0], **options))
    assert "% of its draft tokens accepted" in caplog.text
    assert "tokens a pass" in caplog.text


def test_folders_and_standard_input(random_folders, tmp_path, monkeypatch):
    for name in ("one/a.flac", "one/deep/a.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_flac(tone(0.5)))
    (tmp_path / "one" / "notes.md").write_text("no audio")
    (tmp_path / "one" / "album.mp3").mkdir()
    stdin = io.TextIOWrapper(io.BytesIO(encode_flac(tone(0.5))))
    monkeypatch.setattr("sys.stdin", stdin)
    sources = [tmp_path / "one", type(tmp_path)("-")]
    options = dict(format="all", output_dir=tmp_path / "texts", method="chunked")
    written = run(config(sources, random_folders[1], **options))
    names = {str(path.relative_to(tmp_path / "texts")) for path in written}
    suffixes = ("txt", "srt", "vtt", "tsv", "json")
    stems = ("a", "deep/a", "stdin")
    assert names == {f"{stem}.{suffix}" for stem in stems for suffix in suffixes}
    assert all(path.is_file() for path in written)


@pytest.mark.parametrize("closed", [None, io.TextIOWrapper(io.BytesIO())])
def test_a_closed_standard_input_is_a_sentence(random_folders, tmp_path, monkeypatch, closed):
    if closed:
        closed.close()
    monkeypatch.setattr("sys.stdin", closed)
    with pytest.raises(
        SomeFailed, match=r"standard input cannot be read \(.*closed.*\): name a file"
    ):
        run(config([type(tmp_path)("-")], random_folders[1], output_dir=tmp_path))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SomeFailed, match="standard input: not an audio file"):
        run(config([type(tmp_path)("-")], random_folders[1], output_dir=tmp_path))


def test_a_track_that_is_not_there_and_a_file_that_is_too_long(random_folders, tmp_path):
    (tmp_path / "a.flac").write_bytes(encode_flac(tone(3)))
    for flags, complaint in (
        (dict(track=2), r"a\.flac: no audio track 2; the file has 1 \(flac"),
        (dict(max_seconds=2.5), r"a\.flac: longer than 2\.5 s: split it, or raise max_seconds"),
    ):
        with pytest.raises(SomeFailed, match=complaint):
            run(config([tmp_path / "a.flac"], random_folders[1], output_dir=tmp_path, **flags))
    run(config([tmp_path / "a.flac"], random_folders[1], output_dir=tmp_path, track=1))


def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"x\.wav and .*x\.mp3 would both be written"):
        target_paths([tmp_path / "a/x.wav", tmp_path / "b/x.mp3"], tmp_path)
    with pytest.raises(InputError, match="no audio"):
        target_paths([], tmp_path)
    with pytest.raises(InputError, match="holds no audio"):
        target_paths([tmp_path], tmp_path)


@pytest.mark.parametrize("folder", ["texts", "texts/below"])
def test_a_folder_that_is_none_is_refused_before_anything_is_loaded(tmp_path, folder):
    (tmp_path / "texts").touch()
    with pytest.raises(InputError, match=r"cannot write to .*texts: choose another"):
        run(config([tmp_path / "a.wav"], "no model", output_dir=tmp_path / folder))


def test_what_cannot_be_written_does_not_stop_the_others(random_folders, tmp_path, capsys):
    files = [tmp_path / f"{'b' * 252}.au", tmp_path / "a.flac"]  # with .json the first is too long
    for file in files:
        file.write_bytes(encode_flac(tone(0.5)))
    with pytest.raises(SomeFailed, match=r"1 of 2 files .*\n.*cannot write .*bbb\.json: File"):
        run(config(files, random_folders[1], format="json", output_dir=tmp_path))
    assert (tmp_path / "a.json").is_file()
    assert "bbb.au: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (dict(method="chunked", word_timestamps=True), "--word-timestamps .* --method sequential"),
        (dict(method="chunked", clips=(1.0,)), "--clips would .* add --method sequential"),
        (dict(chunk_length=15.0, stride=2.0), "--chunk-length, --stride .* add --method chunked"),
        (
            dict(highlight_words=True),
            "--highlight-words would have no effect: add --word-timestamps",
        ),
        (dict(word_timestamps=True, max_line_count=2), "add --max-line-width"),
        (dict(vad_padding=0.1), "--vad-padding would have no effect: add --vad"),
        (dict(draft_tokens=2), "add --assistant"),
        (dict(patience=2.0), "add --beams"),
        (dict(batch_size=0), "at least 1"),
        (dict(max_seconds=0.0), "max_seconds is 0: it must be above 0"),
        (dict(assistant="lookup", beams=5), "--assistant drafts one text and --beams 5"),
    ],
)
def test_flags_that_contradict_each_other_or_do_nothing_are_refused(flags, complaint):
    with pytest.raises(InputError, match=complaint):
        check_flags(with_flags(TranscribeConfig((), "m"), **flags))


def test_flags_that_go_together_and_the_dictionary():
    plain = TranscribeConfig((), "m")
    check_flags(plain)
    check_flags(with_flags(plain, vad=True, vad_padding=0.1, beams=2, patience=2.0))
    check_flags(with_flags(plain, word_timestamps=True, max_line_width=9, max_line_count=2))
    check_flags(with_flags(plain, method="chunked", chunk_length=15.0))
    assert isinstance(Transcript("", (), "en").as_dict()["segments"], tuple)
