"""Results on disk: continued behind the last whole batch, whatever a kill left."""

import json

import pytest

from flax_distil.errors import InputError
from flax_distil.evaluate.results import BatchTime, ClipResult, Part, Results

PART = {"test": "short", "setting": "", "dataset": "d\udcff"}  # a path of any bytes


def batch(first: int, models=("a", "b"), size=2) -> tuple[list[ClipResult], BatchTime]:
    clips = [
        ClipResult(
            **PART,  # type: ignore[arg-type]
            id=f"c{n}",
            speaker=None,
            model=model,
            language="en",
            seconds=1.0,
            reference="one",
            text=f"{model} {n}",
        )
        for model in models
        for n in range(first, first + size)
    ]
    return clips, BatchTime(
        **PART,  # type: ignore[arg-type]
        clips=size,
        audio_seconds=2.0,
        windows=size,
        seconds=dict.fromkeys(models, 0.5),
    )


def test_what_was_added_is_there_again(tmp_path):
    results = Results.open(tmp_path, {"dtype": "float32"})
    for first in (0, 2):
        results.add(*batch(first))
    again = Results.open(tmp_path, {"dtype": "float32"})
    assert (again.clips, again.batches) == (results.clips, results.batches)
    assert again.resumed == {Part(**PART): 2}  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 40, 300])
@pytest.mark.parametrize("name", ["clips.jsonl", "batches.jsonl"])
def test_a_batch_that_was_cut_off_is_done_again(tmp_path, name, cut):
    """A kill may leave any of the bytes of the last batch; its clips are written first."""
    results = Results.open(tmp_path, {})
    results.add(*batch(0))
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    results.add(*batch(2))
    for path in (tmp_path / "clips.jsonl", tmp_path / "batches.jsonl"):
        left = path.read_bytes()[len(whole[path.name]) :]
        kept = left[: min(cut, len(left) - 1)]
        if path.name != name:
            kept = left if path.name == "clips.jsonl" else b""
        path.write_bytes(whole[path.name] + kept)
    again = Results.open(tmp_path, {})
    assert len(again.batches) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    again.add(*batch(2))
    assert len(Results.open(tmp_path, {}).clips) == 8


def test_results_of_something_else_are_kept(tmp_path):
    Results.open(tmp_path, {"dtype": "float32"}).add(*batch(0))
    with pytest.raises(InputError, match=r"other models.*--overwrite"):
        Results.open(tmp_path, {"dtype": "bfloat16"})
    assert Results.open(tmp_path, {"dtype": "float32"}).clips
    assert not Results.open(tmp_path, {"dtype": "bfloat16"}, overwrite=True).clips
    assert json.loads((tmp_path / "settings.json").read_text()) == {"dtype": "bfloat16"}
