"""Rows of Parquet files: numbers straight from Arrow's memory, counts from the files' footers."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.data.rows import ParquetRows, cell
from flax_distil.data.utterances import read_dataset

STATES = np.arange(24, dtype=np.float16).reshape(4, 3, 2)  # rows, tokens, width


def states(kind: pa.DataType) -> pa.Array:
    """Lists of fixed-size lists, as label stores hold final states."""
    numbers = pa.array(STATES.reshape(-1).astype(kind.to_pandas_dtype()))
    return pa.ListArray.from_arrays([0, 3, 6, 9, 12], pa.FixedSizeListArray.from_arrays(numbers, 2))


class NoObjects:
    """Arrow's arrays, but no Python object is made of their numbers."""

    def __init__(self, values: pa.Array):
        self.values = values

    @property
    def __class__(self):
        return type(self.values)

    def __getattr__(self, name):
        assert name not in ("to_pylist", "as_py", "tolist")
        found = getattr(self.values, name)
        return (lambda *args: NoObjects(found(*args))) if name == "flatten" else found


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.uint16()])
def test_lists_of_numbers_share_arrow_s_memory(kind):
    whole = states(kind)
    for row, expected in enumerate(STATES):
        found = cell(NoObjects(whole.slice(row, 1)))
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (kind.to_pandas_dtype(), (3, 2))
        assert np.array_equal(found, expected)
        buffer = whole.values.values.buffers()[1]
        assert buffer.address <= found.ctypes.data < buffer.address + buffer.size


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([[1, 2]], pa.list_(pa.int32())), np.array([1, 2])),
        (pa.array([[]], pa.list_(pa.list_(pa.float16(), 2))), np.zeros((0, 2))),
        (pa.array([{"array": [0.5], "sampling_rate": 8}]), {"array": [0.5], "sampling_rate": 8}),
        (pa.array([[1, None]]), [1, None]),
        (pa.array([[[1.0, None]]], pa.list_(pa.list_(pa.float32(), 2))), [[1.0, None]]),
        (pa.array([None], pa.list_(pa.int32())), None),
        (pa.array([["a"]]), ["a"]),
        (pa.array([{"bytes": b"x", "path": None}]), {"bytes": b"x", "path": None}),
    ],
)
def test_cells(values, expected):
    found = cell(values)
    assert type(found) is type(expected)
    assert np.shape(found) == np.shape(expected)
    assert str(found) == str(expected) or np.array_equal(found, expected)


def test_stored_states_are_read_without_objects(tmp_path):
    path = tmp_path / "a.parquet"
    audio = [{"bytes": b"x", "path": None}] * 4
    table = pa.table(
        {"audio": audio, "teacher_states": states(pa.float16()), "token_ids": [[1, 2]] * 4}
    )
    pq.write_table(table, path, row_group_size=3)
    found = read_dataset(path)
    for number, utterance in enumerate(found):
        assert np.array_equal(utterance.teacher_states, STATES[number])
        assert not utterance.teacher_states.flags.owndata
        assert utterance.token_ids == (1, 2)
        assert type(utterance.token_ids[0]) is int


def test_texts_are_counted_by_footers(tmp_path, monkeypatch, caplog):

    def counts(source) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            read_dataset(source)
        return caplog.messages[0].removeprefix(f"{source}: ")

    for name, texts in (("a", ["x", None, ""]), ("b", [None, None])):
        table = pa.table({"audio": [b"x"] * len(texts), "text": pa.array(texts, pa.string())})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    read = pq.ParquetFile.read
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    assert counts(tmp_path) == "5 rows, 2 with text, 3 without"
    monkeypatch.setattr(pq.ParquetFile, "read", read)
    pq.write_table(pa.table({"audio": [b"x"] * 2}), tmp_path / "c.parquet")
    pq.write_table(
        pa.table({"audio": [b"x"], "text": ["y"]}), tmp_path / "d.parquet", write_statistics=False
    )
    assert counts(tmp_path) == "8 rows, 3 with text, 5 without"
    assert counts(tmp_path / "c.parquet") == "2 rows, 0 with text, 2 without"


def test_a_row_s_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"audio": ["x", "y"]}), tmp_path / name / "c.parquet")
    rows = ParquetRows([f"{tmp_path}/{name}/c.parquet" for name in ("a", "b")])
    folders = [rows.folder(number) for number in (0, 1, 2, -1)]
    assert folders == [f"{tmp_path}/{name}" for name in ("a", "a", "b", "b")]
