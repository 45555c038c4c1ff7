import dataclasses
import io
import json

from rich.console import Console

from flax_distil.evaluate.report import ClipResult, DatasetResult, ModelResult, Report, largest_gaps
from flax_distil.text.wer import ErrorCounts

CLEAN = DatasetResult("clean", 2, 10.0, 1.0, ErrorCounts(2, 1, 1, 40))
NOISY = DatasetResult(
    "noisy | loud", 1, 30.0, 1.0, ErrorCounts(5, 0, 0, 10), ErrorCounts(6, 2, 0, 50)
)
REPORT = Report(
    (
        ModelResult("teacher", "runs/t", 37_760_256, 1.0, (CLEAN,)),
        ModelResult("student", "runs/s", 30_000_000, 1.5, (CLEAN, NOISY)),
    ),
    {"clean": ["x: no reference"]},
    {"device": "cpu"},
    (ClipResult("clean", "a", "teacher", "en", 3.5, "Hello.", "hallo", 100.0, -0.5, 1.0),),
)


def test_rates_are_percent_and_rtf_is_time_over_audio():
    assert (CLEAN.wer, CLEAN.cer, CLEAN.rtf) == (10.0, None, 0.1)
    assert NOISY.cer == 16.0
    student = REPORT.models[1]
    assert student.wer == 30.0  # the mean of 10 and 50, not 9 errors in 50 words
    assert student.rtf == 2 / 40


def test_the_json_has_the_promised_keys(tmp_path):
    REPORT.save(tmp_path / "deep" / "er")
    written = json.loads((tmp_path / "deep" / "er" / "report.json").read_text())
    first = written["models"][0]
    assert {key: first[key] for key in ("name", "parameters", "wer", "rtf", "relative_speed")} == {
        "name": "teacher",
        "parameters": 37_760_256,
        "wer": 10.0,
        "rtf": 0.1,
        "relative_speed": 1.0,
    }
    assert first["datasets"][0]["deletions"] == 1
    lines = (tmp_path / "deep" / "er" / "transcripts.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["hallo"]


def test_a_dataset_s_path_may_be_any_bytes(tmp_path):
    clip = dataclasses.replace(REPORT.clips[0], dataset="caf\udce9")
    dataclasses.replace(REPORT, clips=(clip,)).save(tmp_path)
    (line,) = (tmp_path / "transcripts.jsonl").read_text().splitlines()
    assert json.loads(line)["dataset"] == "caf\udce9"


def test_the_table_has_a_row_for_each_dataset_and_the_mean():
    heads, rows = REPORT.rows()
    assert heads[:4] == ["model", "params", "data", "WER %"]
    assert {len(row) for row in rows} == {len(heads)}
    assert [row[3] for row in rows] == ["10.0", "10.0", "50.0", "30.0"]
    assert rows[0][-1] == "1.00×"
    assert rows[3][-1] == "1.50×"
    screen = io.StringIO()
    Console(file=screen, width=80).print(REPORT.table())
    assert "37.8 M" in screen.getvalue()
    assert "…" not in screen.getvalue()


def test_the_clips_on_which_models_differ_most_come_first():
    def one(id: str, model: str, wer: float) -> ClipResult:
        return ClipResult("d", id, model, "en", 1.0, "so", f"{model} says", wer, -0.5, 1.0)

    wers = {"a": (0.0, 50.0), "b": (100.0, 0.0), "c": (20.0, 20.0)}
    clips = [
        one(id, model, wer)
        for id, pair in wers.items()
        for model, wer in zip(("teacher", "student"), pair, strict=True)
    ]
    heads, rows = largest_gaps(Report(REPORT.models, {}, {}, tuple(clips)), 2)
    assert heads == ["clip", "reference", "teacher", "student"]
    assert rows == [
        ["b", "so", "teacher says (100 %)", "student says (0 %)"],
        ["a", "so", "teacher says (0 %)", "student says (50 %)"],
    ]


def test_the_markdown_is_one_whole_table():
    table = [line for line in REPORT.to_markdown().splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in table}
    assert len(table) == 6
    assert len(bars) == 1
    assert "1 clips skipped" in REPORT.to_markdown()


def test_the_table_of_several_models_and_datasets_fits_80_columns():
    sets = tuple(
        dataclasses.replace(CLEAN, name=name) for name in ("heldout-human", "heldout-synthetic")
    )
    models = tuple(
        dataclasses.replace(REPORT.models[0], name=name, datasets=sets)
        for name in ("teacher", "untrained", "student")
    )
    console = Console(width=80, record=True)
    console.print(dataclasses.replace(REPORT, models=models).table())
    text = console.export_text()
    assert "heldout-synthetic" in text
    assert len(text.strip().splitlines()) == 2 + 3 * 3
