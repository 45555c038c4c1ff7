"""Tables, Markdown, JSON and HTML of results made by hand."""

import dataclasses
import json
import re

import pytest
from rich.console import Console

from flax_distil.config import EvaluateConfig
from flax_distil.evaluate.html import encode_mp3, to_html
from flax_distil.evaluate.latency import Latency
from flax_distil.evaluate.report import Report, make_report
from flax_distil.evaluate.results import BatchTime, ClipResult, Results, Test

MODELS = {"teacher": ("runs/t", 37_760_256), "student | 2": ("runs/s", 30_000_000)}
TEXTS = {"teacher": ("the big dog", "house"), "student | 2": ("the big dock", "at the house <b>")}


def results(tests: dict[Test, str], dataset: str = "clean") -> Results:
    made = Results()
    for test, setting in tests.items():
        part = {"test": test, "setting": setting, "dataset": dataset}
        clips = [
            ClipResult(
                **part,  # type: ignore[arg-type]
                id=f"c{number}",
                speaker=None,
                model=model,
                language="en",
                seconds=5.0,
                reference="" if test == "non-speech" else reference,
                text=text,
                ended=number == 0,
                detected="en" if number or model == "teacher" else "cy",
                no_speech_probability=0.9 if test == "non-speech" else 0.1,
                mean_log_probability=-2.0 if number else -0.1,
            )
            for model, texts in TEXTS.items()
            for number, (reference, text) in enumerate(
                zip(("the big dog", "house"), texts, strict=True)
            )
        ]
        taken = BatchTime(
            **part,  # type: ignore[arg-type]
            clips=2,
            audio_seconds=10.0,
            windows=2,
            seconds={"teacher": 1.0, "student | 2": 0.5},
        )
        made.add(clips, taken)
    return made


def make_example_report() -> Report:
    """Two models under every test."""
    tests: dict[Test, str] = {
        "short": "",
        "long": "sequential",
        "noise": "white, 10 dB",
        "prompt": "50 tokens",
        "non-speech": "",
    }
    speeds = [
        Latency("teacher", 1, 0.4, 5.0, 8, 9.0, 2**30, texts=("a",)),
        Latency("student | 2", 1, 0.1, 5.0, 8, 3.0, 2**29, 0.75, ("a",)),
    ]
    config = EvaluateConfig(tuple(MODELS), ("clean",), resamples=100)
    skipped = {"clean": ["x: no reference"], "other": []}
    return make_report(config, MODELS, {}, results(tests), skipped, speeds)


@pytest.fixture
def report() -> Report:
    return make_example_report()


def test_scores_by_hand(report):
    tables = report.to_json()["tables"]
    teacher, student = report.models
    assert (teacher["wer"], student["wer"]) == (0, 75)  # 1 of 3 and 2 of 1, over 4 words
    assert (teacher["rtf"], student["relative_speed"]) == (0.1, 2.0)
    assert student["difference"]["value"] == 75
    assert (teacher["language"], student["language"]) == (100, 50)
    assert student["datasets"][0]["insertions"] == 50
    assert tables["long"][1] == tables["long"][1] | {"IER": 50, "SER": 25, "DER": 0, "5-Dup.": 0}
    assert tables["long"][0]["ms a window"] == 500
    assert tables["noise"][1]["10 dB"] == 75
    assert tables["prompts"][0]["not ended %"] == 50
    silent = tables["non-speech"][1]
    assert silent["words a minute"] == 42
    assert (silent["with text %"], silent["with text, rule %"]) == (100, 50)
    assert silent["no-speech AUC"] == 1
    fast = tables["latency"][1]
    assert (fast["relative"], fast["tokens/s"], fast["accepted %"]) == (4, 80, 75)
    assert fast["texts of the first"] == "1 of 1 equal"
    assert report.skipped == {"clean": ["x: no reference"]}


def test_files(report, tmp_path):
    report.save(tmp_path / "deep" / "er")
    written = json.loads((tmp_path / "deep/er/report.json").read_text())
    assert written["models"][0]["name"] == "teacher"
    assert written["tables"]["summary"][1]["difference"]["value"] == 75
    text = (tmp_path / "deep/er/report.md").read_text()
    assert "student \\| 2" in text
    assert "x: no reference" in text
    assert "c1, reference: house" in text
    report.print(Console(width=80))


def test_names_may_be_any_bytes(report, tmp_path):
    dataclasses.replace(report, skipped={"caf\udce9": ["a: b"]}).save(tmp_path)
    assert "caf\udce9" in json.loads((tmp_path / "report.json").read_text())["skipped"]


def test_texts_are_escaped_and_the_page_needs_nothing_else(report):
    page = to_html(report)
    assert "<b>" not in page
    assert not re.search(r"(src|href|url)\W{1,2}(http|//)", page.replace('xmlns="http', ""))
    assert page.count("<table>") == len(report.tables)
    assert "75.0" in page


def test_mp3_is_the_clip():
    import numpy as np

    from flax_distil.audio.load import load_audio

    time = np.arange(16_000) / 16_000
    waveform = 0.5 * np.sin(2 * np.pi * 440 * time)
    heard = load_audio(encode_mp3(waveform))
    assert abs(heard.size - 16_000) < 3_000  # the encoder's frames and delay
    spectrum = np.abs(np.fft.rfft(heard[2_000:12_000]))
    assert np.argmax(spectrum) * 16_000 / 10_000 == pytest.approx(440, abs=5)


@pytest.mark.parametrize("missing", ["short", "long"])
def test_a_report_of_recordings_or_of_clips_alone(missing):
    tests: dict[Test, str] = {"short": "", "long": "sequential"}
    del tests[missing]  # type: ignore[arg-type]
    made = make_report(
        EvaluateConfig(tuple(MODELS), ("x",), resamples=0), MODELS, {}, results(tests), {}, []
    )
    assert [one["wer"] for one in made.models] == [0, 75]
    assert made.to_markdown()
