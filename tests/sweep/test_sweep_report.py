"""Tables and curves of scripted results, against numbers made by hand."""

import json
import re

import pytest

from flax_distil.errors import SomeFailed
from flax_distil.evaluate import html
from flax_distil.evaluate.plots import figures, plot_curve
from flax_distil.sweep import run

# Wrong words of ten in each dataset.
WRONG = {"whisper-base": (0, 1), "base": (1, 3), "max_wer=5": (2, 2), "max_wer=50": (10, 10)}


def tables_of(folder) -> dict[str, list[dict]]:
    return json.loads((folder / "out" / "sweep.json").read_text())["tables"]


@pytest.fixture
def swept(sweep, script, tmp_path):
    """λ of 1 (fails), 5, 10 (the recipe's) and 50."""
    script.wrong = WRONG
    with pytest.raises(SomeFailed):
        run(sweep("filter.max_wer = [50, 5, 1]"))
    return tmp_path


def test_a_table_has_the_values_in_order_and_the_figures_of_each_run(swept):
    _, five, ten, fifty = rows = tables_of(swept)["max_wer"]
    assert [row["max_wer"] for row in rows] == [1, 5, 10, 50]
    assert [row["WER %"] and row["WER %"]["value"] for row in rows] == [None, 20, 20, 100]
    assert five["difference"]["value"] == 0  # one more error in clean, one less in noisy
    assert five["difference"]["low"] < 0 < five["difference"]["high"]
    assert five["difference"]["p"] > 0.5
    assert ten["difference"] is None  # the others are compared with it
    assert fifty["difference"]["value"] == 80
    assert fifty["difference"]["low"] > 50
    assert fifty["difference"]["p"] < 0.02
    assert {row["teacher WER %"]["value"] for row in rows} == {5}
    assert [row["labels"] for row in rows] == [None, 10, 20, 100]
    assert [row["kept %"] for row in rows] == [None, 10, 20, 100]
    assert [row["parameters, M"] for row in rows] == [None, 2, 2, 2]
    assert [row["speed"] for row in rows] == [None, 4, 4, 4]  # 0.4 of the audio's time over 0.1
    assert [row["failed"] for row in rows] == ["filter", None, None, None]


def test_each_dataset_has_its_error_rate(swept):
    rows = {row["run"]: (row["clean"], row["noisy"]) for row in tables_of(swept)[
        "error_rate_by_dataset"]}  # fmt: skip
    assert rows == {name: (10 * clean, 10 * noisy) for name, (clean, noisy) in WRONG.items()}


def test_failures_are_listed_with_their_reason(swept):
    error = "filter: none of 100 labels is kept"
    assert tables_of(swept)["failed"] == [{"run": "max_wer=1", "error": error}]


def test_the_curve_has_the_points_of_the_table(sweep, script):
    script.wrong = WRONG
    report = run(sweep("filter.max_wer = [50, 5]"))
    assert report is not None
    (curve,) = report.curves
    assert list(curve.panels) == ["WER %", "long, chunked: WER %"]
    for lines in curve.panels.values():
        points = {name: [(x, rate.value) for x, rate in line] for name, line in lines.items()}
        assert points["student"] == [(5, 20), (10, 20), (50, 100)]
        assert points["teacher"] == [(5, 5), (10, 5), (50, 5)]
    axes = plot_curve(curve).axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5", "10", "50"]
    drawn = [segment.tolist() for one in axes.collections for segment in one.get_segments()]
    rates = [rate for _, rate in curve.panels["WER %"]["student"]]
    bars = [[[x, rate.low], [x, rate.high]] for x, rate in zip((5, 10, 50), rates, strict=True)]
    assert all(bar in drawn for bar in bars)


def test_the_page_and_the_text_show_what_was_compared(sweep, script, monkeypatch, tmp_path):
    script.wrong = WRONG
    monkeypatch.setattr(html, "figures", figures)
    run(sweep("filter.max_wer = [50, 5]"))
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert ">Sweep of max_wer</h1>" in page
    assert "Error rate and max_wer" in page
    assert page.count("<svg") >= 3  # curve, speed, kinds of errors
    assert not re.search(r"(src|href|url)\W{1,2}(http|//)", page.replace('xmlns="http', ""))
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "| 50 | 100.0" in text
    assert "device: pen and paper" in text
    assert "differences are from the run base, paired over clips" in text


def test_a_grid_has_one_table_of_all_runs_and_a_line_for_each_series(sweep, script, tmp_path):
    fields = "filter.max_wer = [5, 10]\ninit-student.decoder_layers = [1, 2]"
    report = run(sweep(fields, "--design", "grid"))
    assert report is not None
    rows = tables_of(tmp_path)["all_runs"]
    assert [(row["max_wer"], row["decoder_layers"]) for row in rows] == [
        (10, 2), (5, 1), (5, 2), (10, 1),
    ]  # fmt: skip
    assert "max_wer" not in tables_of(tmp_path)
    lines = {curve.value: list(curve.panels["WER %"]) for curve in report.curves}
    assert lines == {
        "max_wer": ["decoder_layers 2", "teacher", "decoder_layers 1"],
        "decoder_layers": ["max_wer 10", "teacher", "max_wer 5"],
    }


def test_no_limit_is_the_last_row_and_no_point(sweep, script, tmp_path):
    report = run(sweep("filter.max_hours = [10, 2.5]"))
    assert report is not None
    assert [row["max_hours"] for row in tables_of(tmp_path)["max_hours"]] == [2.5, 10, "None"]
    assert [x for x, _ in report.curves[0].panels["WER %"]["student"]] == [2.5, 10]


def test_chunk_lengths_are_compared_on_the_same_recordings(sweep, script, tmp_path):
    """The evaluation changes and the student does not; each length has its own teacher's."""
    script.wrong = {"base": (2, 2), "chunk_lengths=10": (1, 1)}
    run(sweep("evaluate.chunk_lengths = [[30.0], [10.0]]"))
    assert [name for name in script.ran if "distill" in name] == ["base/distill"]
    ten, thirty = tables_of(tmp_path)["chunk_lengths"]
    assert (ten["chunk_lengths"], thirty["chunk_lengths"]) == (10, 30)
    assert ten["long, chunked: difference"]["value"] == -10
    assert "chunk_lengths=10/teacher" in script.ran
    rows = tables_of(tmp_path)["long_chunked_error_rate_by_dataset"]
    assert "whisper-base, chunk_lengths=10" in [row["run"] for row in rows]
