import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jiwer
import numpy as np
import pytest

from flax_distil.audio.load import SAMPLE_RATE, encode_flac
from flax_distil.config import EvaluateConfig
from flax_distil.decode.recognizer import Recognizer
from flax_distil.decode.search import Hypothesis
from flax_distil.errors import InputError
from flax_distil.evaluate import evaluator
from flax_distil.evaluate.evaluator import (
    ReferenceClip,
    batches,
    model_names,
    run,
    transcribe_batches,
)
from flax_distil.text.normalize import normalizer

TEXTS = ["One two three.", "Mister O'Neil paid $20, colour!", "It's the fourth of May.", "Yes"]


@pytest.fixture
def manifest(tmp_path):
    """Four good clips and four that nobody can be judged on."""
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate([*TEXTS, "", " . ", "too long", "broken"]):
        seconds = 30.5 if text == "too long" else 0.5 + number / 10
        waveform = rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)
        data = encode_flac(waveform) if text != "broken" else b"nothing"
        (tmp_path / f"{number}.flac").write_bytes(data)
        rows.append({"audio": f"{number}.flac", "text": text, "id": f"clip{number}"})
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def clip(number: int, language: str = "en") -> ReferenceClip:
    return ReferenceClip(str(number), np.zeros(SAMPLE_RATE, np.float32), TEXTS[0], language, 1.0)


def hypothesis(text: str) -> Hypothesis:
    return Hypothesis((1,), text, "en", -0.1, 0.0, 1.0)


def test_real_models_are_judged_from_end_to_end(random_folders, manifest, tmp_path, capsys):
    teacher, student = map(str, random_folders)
    config = EvaluateConfig(
        (teacher, student), (str(manifest),), tmp_path / "out", batch_size=3, max_tokens=9
    )
    report = run(config)
    first, second = report.to_json()["models"]
    assert first["name"] == "teacher"
    assert first["relative_speed"] == 1.0
    assert second["parameters"] < first["parameters"]
    assert first["rtf"] > 0
    assert first["datasets"][0]["clips"] == 4
    reasons = "\n".join(report.skipped[manifest.stem])
    for part in ("clip4: no reference", "clip5: no ref", "clip6: 30.5 s is over", "clip7: "):
        assert part in reasons
    assert "teacher" in capsys.readouterr().out
    lines = (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()
    assert len(lines) == 8


def test_wer_equals_jiwer_over_the_normalised_texts(
    monkeypatch, random_folders, manifest, tmp_path
):
    answers = ["won two three three", "Mr. O'Neil paid twenty dollars, color", "", "no yes"]
    texts = {TEXTS[n]: answer for n, answer in enumerate(answers)}

    def transcribe_batches(recognizers, batches, config):
        for batch in batches:
            said = [hypothesis(texts[clip.reference]) for clip in batch]
            yield evaluator.BatchResult(batch, dict.fromkeys(recognizers, said), {"teacher": 0.5})

    monkeypatch.setattr(evaluator, "transcribe_batches", transcribe_batches)
    config = EvaluateConfig(
        (str(random_folders[0]),),
        (str(manifest),),
        tmp_path / "out",
        batch_size=3,
        character_errors=True,
    )
    report = run(config)
    normal = normalizer("en")
    reference, answer = [list(map(normal, one)) for one in (TEXTS, answers)]
    oracle = jiwer.process_words(reference, answer)
    score = report.models[0].datasets[0]
    assert score.wer == pytest.approx(100 * oracle.wer, abs=1e-9)
    assert score.cer == pytest.approx(100 * jiwer.cer(reference, answer), abs=1e-9)
    assert score.words.deletions == oracle.deletions > 0
    assert score.words.insertions == oracle.insertions > 0
    assert score.words.substitutions == oracle.substitutions > 0
    assert report.clips[1].wer == 0  # the normaliser makes the two texts equal
    assert score.rtf == pytest.approx(1.0 / score.audio_seconds)


def test_hosts_hear_a_part_each_and_together_what_one_hears(monkeypatch, random_folders, manifest):
    """Two threads that think they are hosts."""
    config = EvaluateConfig((str(random_folders[0]),), (str(manifest),), batch_size=3, max_tokens=9)
    alone = evaluator.evaluate_models(config)
    place, met, told = threading.local(), threading.Barrier(2, timeout=60), {}
    opened: dict[int, list[str]] = {0: [], 1: []}
    load_waveform = evaluator.load_waveform

    def from_all_hosts(value):
        told[place.host] = value
        met.wait()
        return [told[0], told[1]]

    def host(number):
        place.host = number
        return evaluator.evaluate_models(config)

    monkeypatch.setattr(evaluator.jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluator.jax, "process_index", lambda: place.host)
    monkeypatch.setattr(evaluator, "from_all_hosts", from_all_hosts)
    monkeypatch.setattr(
        evaluator, "load_waveform", lambda u: opened[place.host].append(u.id) or load_waveform(u)
    )
    with ThreadPoolExecutor(2) as hosts:
        reports = list(hosts.map(host, (0, 1)))
    assert opened == {0: ["clip0", "clip2", "clip6"], 1: ["clip1", "clip3", "clip7"]}
    for report in reports:
        ours, theirs = ({one.id: one.text for one in it.clips} for it in (report, alone))
        assert ours == theirs
        assert report.models[0].datasets[0].words == alone.models[0].datasets[0].words
        assert sorted(*report.skipped.values()) == sorted(*alone.skipped.values())


def test_the_language_asked_for_is_that_of_all_clips(manifest):
    rows = [json.loads(line) | {"language": "de"} for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    for asked, expected in ((None, "de"), ("French", "fr")):
        config = EvaluateConfig((), (), language=asked)
        clips = evaluator.usable_clips(evaluator.open_set(str(manifest), config), [], config, {})
        assert {one.language for one in clips} == {expected}


def test_a_language_that_a_model_lacks_ends_no_evaluation(random_folders, manifest, tmp_path):
    """Its clips are left out for all models, with the model and the reason."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:4]
    for row, language in zip(rows, ("en", "de", "tlh", None), strict=True):
        row["language"] = language
    rows.append({"audio": "missing.flac", "text": "here", "id": "gone"})
    manifest.write_text("\n".join(map(json.dumps, rows)))
    config = EvaluateConfig(
        (str(random_folders[1]),), (str(manifest),), tmp_path / "out", max_tokens=4
    )
    report = run(config)
    assert report.models[0].datasets[0].clips == 2
    german, klingon, gone = report.skipped[manifest.stem]
    assert german.startswith("clip1: student: an English-only checkpoint cannot transcribe German")
    assert klingon.startswith('clip2: Whisper has no language "tlh"')
    assert gone.startswith("gone: ")
    with pytest.raises(InputError, match="student: an English-only checkpoint cannot tr"):
        run(dataclasses.replace(config, language="fr"))


def test_clips_are_judged_in_the_unit_of_their_language(random_folders, monkeypatch, tmp_path):
    texts = {"今天天气很好": ("zh", "今天天汽很好"), "we went home": ("en", "we went hum")}

    def transcribe_batches(recognizers, batches, config):
        for batch in batches:
            said = [hypothesis(texts[clip.reference][1]) for clip in batch]
            yield evaluator.BatchResult(batch, dict.fromkeys(recognizers, said), {"student": 0.5})

    monkeypatch.setattr(evaluator, "transcribe_batches", transcribe_batches)
    monkeypatch.setattr(evaluator, "unsupported", lambda recognizers, language: None)
    sets = []
    (tmp_path / "0.flac").write_bytes(encode_flac(np.zeros(SAMPLE_RATE, np.float32)))
    for text, (language, _) in texts.items():
        sets.append(str(tmp_path / f"{language}.jsonl"))
        row = {"audio": "0.flac", "text": text, "language": language}
        (tmp_path / f"{language}.jsonl").write_text(json.dumps(row))
    config = EvaluateConfig((str(random_folders[1]),), tuple(sets), character_errors=True)
    report = evaluator.evaluate_models(config)
    chinese, english = report.models[0].datasets
    assert (chinese.rate, english.rate, report.rate) == ("CER", "WER", "WER/CER")
    assert (chinese.words.reference_words, chinese.wer) == (6, pytest.approx(100 / 6))
    assert chinese.cer == chinese.wer
    assert english.wer == pytest.approx(100 / 3)
    assert [one.rate for one in report.clips] == ["CER", "WER"]
    heads, rows = report.rows()
    assert heads[3] == "WER/CER %"
    assert [row[2] for row in rows] == ["zh (CER)", "en (WER)", "mean"]
    report = evaluator.evaluate_models(dataclasses.replace(config, error_rate="cer"))
    assert [score.rate for score in report.models[0].datasets] == ["CER", "CER"]
    assert report.rows()[0][3] == "CER %"
    assert (
        "CER, substitutions, deletions and insertions are percent of the reference characters"
        in report.to_markdown()
    )


def test_results_are_not_lost_over_a_folder_that_is_none(manifest, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=r"cannot write to .*out: choose"):
        run(EvaluateConfig(("no model",), (str(manifest),), tmp_path / "out"))


def test_batches_have_one_language_and_lose_no_clip():
    languages = ["en", "de", "en", "en", "de", "fr", "en", "en"]
    clips = [clip(number, language) for number, language in enumerate(languages)]
    made = list(batches(clips, 3))
    assert [[one.id for one in batch] for batch in made] == [
        ["0", "2", "3"],
        ["1", "4"],
        ["5"],
        ["6", "7"],
    ]


def test_times_are_paired_medians_without_compilation(monkeypatch):
    """A clock of our own: a takes 4 s, b 2 s, the first call of a size 100 s more."""
    now, seen, calls = [0.0], set(), []

    models = {name: object.__new__(Recognizer) for name in "ab"}

    def recognize(model, waveforms_BN, options, **_):
        name = next(name for name in models if models[name] is model)
        calls.append(name)
        slow = (name, len(waveforms_BN)) not in seen
        seen.add((name, len(waveforms_BN)))
        now[0] += {"a": 4.0, "b": 2.0}[name] + 100 * slow + (50 if len(calls) == 5 else 0)
        return [hypothesis("x")] * len(waveforms_BN)

    monkeypatch.setattr(evaluator, "recognize", recognize)
    monkeypatch.setattr(evaluator.time, "perf_counter", lambda: now[0])
    config = EvaluateConfig(("a", "b"), ("d",), passes=3)
    clips = [[clip(0)] * 2, [clip(1)] * 2, [clip(2)]]
    rounds = list(transcribe_batches(models, clips, config))
    assert [one.seconds for one in rounds] == [{"a": 4.0, "b": 2.0}] * 3
    assert calls[:2] == ["a", "b"]
    assert calls[8:10] == ["b", "a"]  # the second batch begins with the other model


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"models": ("a/student", "b/student")}, "have the same name"),
        ({"names": ("one", "two", "three")}, "3 names for 2 models"),
        ({"datasets": ()}, "at least one model"),
        ({"batch_size": 0}, "batch_size is 0: use 1 or more"),
        ({"datasets": ("none.jsonl",)}, r"none\.jsonl"),
        ({"datasets": ("a/b/c.jsonl", "x/b/c.jsonl")}, r"c\.jsonl"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_loaded(changes, complaint):
    config = {"models": ("a", "b"), "datasets": ("d",)} | changes
    with pytest.raises(InputError, match=complaint):
        run(EvaluateConfig(**config))


def test_datasets_are_called_by_as_much_of_their_name_as_tells_them_apart():
    assert list(evaluator.dataset_names(("a/b/c.jsonl", "org/set_16.1"))) == ["c", "set_16.1"]
    assert list(evaluator.dataset_names(("a/c.parquet", "b/c.parquet"))) == [
        "a/c.parquet",
        "b/c.parquet",
    ]


def test_a_dataset_without_references_is_refused(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text('{"audio": "x.flac"}\n')
    with pytest.raises(InputError, match="no reference text"):
        run(EvaluateConfig(("a",), (str(path),)))


def test_a_dataset_of_which_nothing_is_left_says_why(tmp_path, random_folders):
    path = tmp_path / "clips.jsonl"
    path.write_text('{"audio": "x.flac", "text": "hello", "id": "one"}\n')
    config = EvaluateConfig((str(random_folders[1]),), (str(path),), tmp_path / "out")
    with pytest.raises(InputError, match="none of its 1 clips can be used; the first: one: "):
        run(config)


def test_names_come_from_the_folders_or_from_the_user():
    config = EvaluateConfig(("runs/x/student", "openai/whisper-base"), ("d",))
    assert list(model_names(config)) == ["student", "whisper-base"]
