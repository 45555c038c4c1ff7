"""Evaluations from end to end: counted as jiwer does, repeatable, continued after a kill."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jiwer
import numpy as np
import pytest

from flax_distil.audio.load import SAMPLE_RATE, encode_flac
from flax_distil.config import EvaluateConfig, EvaluationDataConfig
from flax_distil.errors import InputError, SomeFailed
from flax_distil.evaluate import evaluator
from flax_distil.evaluate.evaluator import evaluate_models, run
from flax_distil.evaluate.jobs import model_names, set_names
from flax_distil.evaluate.results import Output
from flax_distil.text.normalize import normalizer

TEXTS = ["One two three.", "Mister O'Neil paid $20, colour!", "It's the fourth of May.", "Yes"]


@pytest.fixture
def manifest(tmp_path):
    """Four good clips, a recording, and four that no model can be evaluated on."""
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate([*TEXTS, "", " . ", "a long one", "broken"]):
        seconds = 31.5 if text == "a long one" else 0.5 + number / 10
        waveform = rng.normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)
        data = encode_flac(waveform) if text != "broken" else b"nothing"
        (tmp_path / f"{number}.flac").write_bytes(data)
        rows.append({"audio": f"{number}.flac", "text": text, "id": f"clip{number}"})
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class ScriptedModel:
    """Answers by the length of the clip; `source` may name languages that it lacks."""

    parameters = 1_000_000

    def __init__(self, name, source, dtype="float32", assistant=None, answers=None):
        self.name, self.source, self.answers = name, source, answers or {}
        self.calls = 0

    def unsupported(self, language):
        return f"it lacks {language}" if language in self.source else None

    def recognize(self, batch):
        self.calls += 1
        lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in batch.waveforms_BN]
        texts = [self.answers.get(round(n / SAMPLE_RATE, 1), "well") for n in lengths]
        return [Output(text=text, no_speech_probability=0.5) for text in texts]

    def transcribe(self, batch):
        return ["a long long one"] * len(batch.waveforms)


@pytest.fixture
def scripted(monkeypatch):
    """Models that answer the four clips, the second of them with errors."""
    answers = ["won two three three", "Mr. O'Neil paid twenty dollars, color", "", "no yes"]
    by_seconds = {round(0.5 + n / 10, 1): answer for n, answer in enumerate(answers)}
    right = {round(0.5 + n / 10, 1): text for n, text in enumerate(TEXTS)}
    made = {}

    def load(name, source, *rest):
        made[name] = ScriptedModel(
            name, source, *rest, answers=right if name == "right" else by_seconds
        )
        return made[name]

    monkeypatch.setattr(evaluator, "load_model", load)
    return made


def rows(report, name: str) -> list[dict]:
    return report.to_json()["tables"][name]


def test_error_rates_are_jiwers_over_the_normalised_texts(scripted, manifest):
    config = EvaluateConfig(("right", "wrong"), (str(manifest),), character_errors=True)
    report = evaluate_models(dataclasses.replace(config, batch_size=3, resamples=200))
    answers = list(scripted["wrong"].answers.values())
    reference, given = ([*map(normalizer("en"), one)] for one in (TEXTS, answers))
    oracle = jiwer.process_words(reference, given)
    right, wrong = rows(report, "datasets")
    words = sum(len(text.split()) for text in reference)
    assert right["WER %"]["value"] == 0
    assert wrong["WER %"]["value"] == pytest.approx(100 * oracle.wer)
    assert wrong["WER %"]["low"] is None  # four clips are too few for an interval
    for name in ("substitutions", "deletions", "insertions"):
        assert wrong[name[:3]] == pytest.approx(100 * getattr(oracle, name) / words)
        assert wrong[name[:3]] > 0
    assert wrong["CER %"] == pytest.approx(100 * jiwer.cer(reference, given))
    long = rows(report, "long")
    assert [row["method"] for row in long] == ["sequential"] * 2 + ["chunked, 30 s"] * 2
    assert long[0]["IER"] == pytest.approx(100 / 3)  # "long" twice
    reasons = "\n".join(report.skipped[manifest.stem])
    for part in ("clip4: no reference", "clip5: no ref", "clip7: "):
        assert part in reasons
    assert len(report.skipped[manifest.stem]) == 3
    assert report.worst[0].rates["wrong"] == 200.0  # two digits joined, and another word
    assert report.worst[0].waveform is not None


def test_real_models_from_end_to_end(random_folders, manifest, tmp_path, capsys):
    """Every test at once; the second run continues the first, and a new folder has the same."""
    teacher, student = map(str, random_folders)
    config = EvaluateConfig(
        (teacher, student),
        (str(manifest),),
        output_dir=tmp_path / "out",
        assistant=student,
        noise=(0.0,),
        prompts=(20,),
        non_speech=2,
        methods=("chunked",),
        chunk_lengths=(20.0,),
        batch_size=3,
        max_tokens=6,
        resamples=50,
    )
    report = run(config)
    names = ["teacher", "student", "teacher with student"]
    assert [one["name"] for one in report.models] == names
    assert report.models[0]["relative_speed"] == 1.0
    assert report.models[1]["parameters"] < report.models[0]["parameters"]
    # Of random weights every language's likelihood is as good; texts are those of greedy search.
    texts = {
        name: [
            json.loads(line)["text"]
            for line in (tmp_path / "out/results/clips.jsonl").read_text().splitlines()
            if json.loads(line)["model"] == name
        ]
        for name in names
    }
    assert texts["teacher with student"] == texts["teacher"]
    assert len(texts["teacher"]) == 4 * (1 + 2 + 1) + 2 + 1
    for name in ("summary", "datasets", "long", "noise", "prompts", "non-speech"):
        assert rows(report, name)
    assert "Without speech" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert "<svg" in page
    assert "data:audio/mpeg" in page
    again = run(dataclasses.replace(config, output_dir=tmp_path / "again"))
    assert again.to_json()["tables"]["noise"] == rows(report, "noise")
    kept = [(tmp_path / name / "results/clips.jsonl").read_bytes() for name in ("out", "again")]
    assert kept[0] == kept[1]


def test_a_killed_evaluation_continues(scripted, manifest, tmp_path, monkeypatch):
    config = EvaluateConfig(
        ("right", "wrong"), (str(manifest),), tmp_path / "out", batch_size=1, noise=(10.0,)
    )
    whole = run(dataclasses.replace(config, output_dir=tmp_path / "whole"))
    recognize, left = ScriptedModel.recognize, iter(range(11))

    def dying(self, *given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return recognize(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(ScriptedModel, "recognize", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    before = len((tmp_path / "out/results/batches.jsonl").read_text().splitlines())
    assert 0 < before < 12
    report = run(config)
    assert sum(model.calls for model in scripted.values()) < 2 * (12 - before + 2)
    for name in ("clips.jsonl", "settings.json"):
        ours, theirs = (tmp_path / path / "results" / name for path in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert rows(report, "noise") == rows(whole, "noise")
    # More noise: what is there is kept; another batch size is another evaluation.
    run(dataclasses.replace(config, noise=(10.0, 5.0)))
    assert scripted["right"].calls <= 2 * 4 + 2
    with pytest.raises(InputError, match=r"other models, datasets or options: .*--overwrite"):
        run(dataclasses.replace(config, batch_size=2))
    run(dataclasses.replace(config, batch_size=2, overwrite=True))


def test_each_host_decodes_its_part_and_all_report_the_whole(monkeypatch, random_folders, manifest):
    """Two threads that act as hosts."""
    config = EvaluateConfig(
        (str(random_folders[0]),), (str(manifest),), batch_size=3, max_tokens=9, methods=()
    )
    alone = evaluate_models(config)
    place, met, values = threading.local(), threading.Barrier(2, timeout=60), {}
    opened: dict[int, list[str]] = {0: [], 1: []}
    load_waveform = evaluator.load_waveform

    def from_all_hosts(value):
        values[place.host] = value
        met.wait()
        return [values[0], values[1]]

    def host(number):
        place.host = number
        return evaluate_models(dataclasses.replace(config, worst=0))

    monkeypatch.setattr(evaluator.jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluator.jax, "process_index", lambda: getattr(place, "host", 0))
    monkeypatch.setattr(evaluator, "from_all_hosts", from_all_hosts)
    monkeypatch.setattr(evaluator, "prefetch", lambda items, _: items)  # in this thread
    monkeypatch.setattr(
        evaluator, "load_waveform", lambda u: opened[place.host].append(u.id) or load_waveform(u)
    )
    with ThreadPoolExecutor(2) as hosts:
        reports = list(hosts.map(host, (0, 1)))
    assert opened == {0: ["clip0", "clip2", "clip6"], 1: ["clip1", "clip3", "clip7"]}
    for report in reports:
        (ours,), (theirs,) = (rows(one, "datasets") for one in (report, alone))
        assert ours["WER %"]["value"] == theirs["WER %"]["value"]
        assert sorted(*report.skipped.values()) == sorted(*alone.skipped.values())


def test_the_language_asked_for_is_that_of_all_clips(scripted, manifest, monkeypatch):
    lines = [json.loads(line) | {"language": "de"} for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    recognize = ScriptedModel.recognize
    for asked, expected in ((None, "de"), ("French", "fr")):
        given = []
        monkeypatch.setattr(
            ScriptedModel,
            "recognize",
            lambda self, batch: given.append(batch.language) or recognize(self, batch),  # noqa: B023
        )
        evaluate_models(EvaluateConfig(("right",), (str(manifest),), language=asked))
        assert set(given) == {expected}


def test_a_language_that_a_model_lacks_ends_no_evaluation(scripted, manifest, tmp_path):
    """Its clips are left out for all models, with the model and the reason."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()][:4]
    for row, language in zip(lines, ("en", "de", "tlh", None), strict=True):
        row["language"] = language
    lines.append({"audio": "missing.flac", "text": "here", "id": "gone"})
    manifest.write_text("\n".join(map(json.dumps, lines)))
    config = EvaluateConfig(("right", "lacks de"), (str(manifest),), tmp_path / "out")
    report = run(config)
    assert rows(report, "datasets")[0]["clips"] == 2
    german, klingon, gone = report.skipped[manifest.stem]
    assert german == "clip1: lacks de: it lacks de"
    assert klingon.startswith('clip2: Whisper has no language "tlh"')
    assert gone.startswith("gone: ")
    with pytest.raises(SomeFailed, match="3 clips were skipped"):
        run(dataclasses.replace(config, strict=True))
    with pytest.raises(InputError, match="lacks de: it lacks de"):
        run(dataclasses.replace(config, language="de", overwrite=True))


def test_a_dataset_without_usable_clips_is_reported(scripted, manifest, tmp_path):
    """One of two; with all of them empty there is nothing to report."""
    (tmp_path / "empty.jsonl").write_text('{"audio": "0.flac", "text": ""}')
    empty = str(tmp_path / "empty.jsonl")
    report = evaluate_models(EvaluateConfig(("right",), (str(manifest), empty)))
    assert report.skipped["empty"] == ["0.flac: no reference"]
    assert {row["dataset"] for row in rows(report, "datasets")} == {"clips"}
    with pytest.raises(InputError, match=r"no clip can be used; empty skipped 1, the first: 0\."):
        evaluate_models(EvaluateConfig(("right",), (empty,)))


def test_clips_are_judged_in_the_unit_of_their_language(scripted, tmp_path, monkeypatch):
    texts = {"今天天气很好": ("zh", "今天天汽很好"), "we went home": ("en", "we went hum")}
    sets = []
    for number, (text, (language, answer)) in enumerate(texts.items()):
        seconds = 1.0 + number
        sound = np.full(round(seconds * SAMPLE_RATE), 0.1, np.float32)
        (tmp_path / f"{number}.flac").write_bytes(encode_flac(sound))
        sets.append(str(tmp_path / f"{language}.jsonl"))
        row = {"audio": f"{number}.flac", "text": text, "language": language}
        (tmp_path / f"{language}.jsonl").write_text(json.dumps(row))
        monkeypatch.setitem(SPOKEN, seconds, answer)
    monkeypatch.setattr(
        evaluator, "load_model", lambda *given: ScriptedModel(*given, answers=SPOKEN)
    )
    config = EvaluateConfig(("m",), tuple(sets), character_errors=True, resamples=0)
    chinese, english = rows(evaluate_models(config), "datasets")
    assert (chinese["dataset"], english["dataset"]) == ("zh (CER)", "en (WER)")
    assert chinese["WER/CER %"]["value"] == chinese["CER %"] == pytest.approx(100 / 6)
    assert english["WER/CER %"]["value"] == pytest.approx(100 / 3)
    report = evaluate_models(dataclasses.replace(config, error_rate="cer"))
    assert all(row["CER %"] for row in rows(report, "datasets"))


SPOKEN: dict[float, str] = {}


def test_groups_and_effective_robustness(scripted, manifest):
    """Named sets of one file: the reference has no errors, the others have."""
    good, bad = (
        EvaluationDataConfig(str(manifest), limit=limit, name=name, group=group, reference=first)
        for limit, name, group, first in ((1, "near", "in", True), (4, "far", "out", False))
    )
    scripted.clear()
    report = evaluate_models(EvaluateConfig(("right", "wrong"), data=(good, bad), resamples=0))
    right, wrong = rows(report, "groups")
    assert (right["in %"]["value"], right["out %"]["value"], right["gap"]["value"]) == (0, 0, 0)
    near, far = (row for row in rows(report, "datasets") if row["model"] == "wrong")
    assert (wrong["in %"], wrong["out %"]) == (near["WER %"], far["WER %"])
    gap = wrong["out %"]["value"] - wrong["in %"]["value"]
    assert wrong["gap"]["value"] == wrong["gap difference"]["value"] == pytest.approx(gap)


def test_a_dataset_without_speech(scripted, manifest):
    """Its texts are hallucinated, whatever the manifest has."""
    data = EvaluationDataConfig(str(manifest), speech=False, name="noise")
    (row,) = rows(evaluate_models(EvaluateConfig(("right",), data=(data,))), "non-speech")
    assert row["clips"] == 6
    assert row["with text %"] == 100
    assert row["words a minute"] > 60


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"chunk_lengths": (40.0,)}, "chunk_length is 40.0 s"),
        ({"latency": (0, 4)}, r"latency are \(0, 4\): use 1 or more"),
        ({"prompts": (0,)}, "prompts are"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_clips": 0}, "max_clips is 0: use 1 or more"),
        ({"non_speech": -1}, "non_speech is -1: use 0 or more"),
        ({"run": Path("nowhere")}, r"nowhere has no metrics.jsonl"),
        ({"noise_recordings": "noise"}, "without a ratio to mix it at"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(scripted, manifest, change, complaint):
    config = dataclasses.replace(EvaluateConfig(("right",), (str(manifest),)), **change)
    with pytest.raises(InputError, match=complaint):
        evaluate_models(config)
    assert not scripted


def test_names_tell_models_and_datasets_apart():
    config = EvaluateConfig(("a/student", "b/teacher"), ("x",), assistant="a/student")
    assert list(model_names(config)) == ["student", "teacher", "student with student"]
    with pytest.raises(InputError, match=r"same name \(student, student\): add --names"):
        model_names(EvaluateConfig(("a/student", "b/student"), ("x",)))
    with pytest.raises(InputError, match="1 names for 2 models"):
        model_names(EvaluateConfig(("a", "b"), ("x",), names=("c",)))
    with pytest.raises(InputError, match="at least one model"):
        model_names(EvaluateConfig(("a",)))
    data = [
        EvaluationDataConfig("librispeech_asr", config="clean", split="test"),
        EvaluationDataConfig("en/clips.jsonl"),
        EvaluationDataConfig("fr/clips.jsonl"),
    ]
    assert set_names(data[:2]) == ["librispeech_asr clean test", "clips"]
    assert set_names(data)[1:] == ["en/clips", "fr/clips"]
