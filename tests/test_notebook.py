"""The evaluation notebook runs from top to bottom, and stays a notebook."""

import json
import wave
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "evaluate.ipynb"


@pytest.fixture
def clips(tmp_path) -> Path:
    """A manifest of two synthetic wav files."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(rng.normal(0, 3000, 8000).astype(np.int16).tobytes())
    rows = [{"audio": f"{name}.wav", "text": f"Clip {name}."} for name in ("one", "two")]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # sockets of the kernel's client
def test_the_notebook_runs(clips, random_folders, tmp_path, monkeypatch):
    for name, value in {
        "TEACHER": random_folders[0],
        "STUDENT": random_folders[1],
        "DATASET": clips,
        "OUTPUT": tmp_path / "out",
        "MAX_CLIPS": 2,
        "NON_SPEECH": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    kinds = {
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    }
    assert {"text/html", "text/markdown", "image/png"} <= kinds  # a player, a table, a plot
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "student"]
    assert report["models"][0]["datasets"][0]["clips"] == 2


def test_the_notebook_is_short_clean_and_without_logic():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) < 20
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for word in ("def ", "class ", "for ", "while ", "if "):
        assert not any(
            line.lstrip().startswith(word) for one in sources for line in one.split("\n")
        )
    assert not any(cell.get("outputs") for cell in notebook.cells)
