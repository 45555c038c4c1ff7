"""What cells of a row mean, and that no cell of a stranger ends a run."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.audio.load import AudioError
from flax_distil.config import DataConfig
from flax_distil.data.table import (
    Table,
    array_to_waveform,
    cell_name,
    cell_seconds,
    cell_text,
    escape,
    find_columns,
)
from flax_distil.data.utterances import Skipped, Utterances, load_waveform, read_dataset


def utterances(*rows) -> Utterances:
    config = DataConfig("rows")
    return Utterances(rows, find_columns(Table(tuple(rows[0]), rows), config), config)


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        ("fine ä 😀", "fine ä 😀", "fine ä 😀"),
        ("lone \ud800", r"lone \ud800", "lone \ufffd"),
        ("nul\0, line\n", r"nul\x00, line\n", "nul\ufffd, line\n"),
        (42, "42", "42"),
        (float("nan"), None, None),
        (None, None, None),
        ("", "", ""),
        (b"caf\xe9", "caf\ufffd", "caf\ufffd"),
    ],
)
def test_names_and_texts(value, name, text):
    assert (cell_name(value), cell_text(value)) == (name, text)
    for one in (name, text):
        assert one is None or one.encode() is not None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(1, 1.0), ("1.5", 1.5), (np.float32(2), 2.0), (0, 0.0)]
    + [(value, None) for value in (None, "0:07", -1, float("inf"), True, [1], "", 10**400)],
)
def test_seconds(value, seconds):
    assert cell_seconds(value) == seconds


def test_numbers_of_parquet_are_no_times(tmp_path):
    table = pa.table(
        {"audio": ["a.wav"] * 2, "duration": [[1.0, 2.0], []], "token_ids": [["x"], []]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = read_dataset(tmp_path / "a.parquet")
    assert "must be seconds" in (first.fault or "")
    assert (second.duration, second.token_ids) == (None, ())


def test_what_is_skipped_can_be_written():
    skipped = Skipped("a\ud800", "gone: \udce9\n")
    assert (skipped.id, skipped.reason) == (r"a\ud800", r"gone: \udce9\n")
    assert escape(skipped.reason) == skipped.reason


def test_hostile_rows_are_faults_of_theirs(tmp_path):
    """Names and texts with surrogates, NUL and new lines; cells of other types than they should."""
    rows = [
        {"audio": "a\ud800\0.wav", "text": "\udfff\0", "speaker": "s\n", "id": "i\ud800"},
        {"audio": "a.wav", "token_ids": "abc"},
        {"audio": "a.wav", "token_ids": [[1], [2, 3]]},
        {"audio": "a.wav", "condition_on_prev": [1, "x"]},
        {"audio": "a.wav", "duration": [1]},
        {"audio": {"path": 3}},
        {"audio": {"bytes": "no base64"}},
        {"audio": {"array": [[1.0], [2.0, 3.0]], "sampling_rate": 16_000}},
        {"audio": "a.wav", "text": ["a", "b"]},
        {"audio": 7},
        {},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_dataset(path)
    for utterance in found:
        for text in (utterance.id, utterance.text, utterance.speaker):
            assert text is None or text.encode() is not None
        with pytest.raises(AudioError) as error:
            load_waveform(utterance)
        Skipped(utterance.id, str(error.value)).reason.encode()
    assert "row 1 has token_ids 'abc': it must be a list of integers" in (found[1].fault or "")
    assert "row 8 has text ['a', 'b']: it must be text" in (found[8].fault or "")
    assert "row 4 has duration [1]: it must be seconds" in (found[4].fault or "")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int64])
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1)])
def test_samples_as_audio(tmp_path, tone, kind, shape):
    """Lists and arrays of a Parquet file, as `datasets` writes decoded audio."""
    sound = tone(0.5)
    samples = sound if np.issubdtype(kind, np.floating) else np.round(sound * 2**15)
    samples = samples.astype(kind).reshape(shape)
    cell = {"array": samples.tolist(), "sampling_rate": 16_000, "path": "a.flac"}
    pq.write_table(pa.table({"audio": [cell]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"audio": [samples.tolist()]}), tmp_path / "b.parquet")
    for name in "ab":
        (found,) = read_dataset(tmp_path / f"{name}.parquet")
        assert load_waveform(found) == pytest.approx(sound, abs=2**-15)


def test_samples_at_another_rate(tone):
    """440 Hz at 8 kHz is 440 Hz at 16 kHz; the rate stands in the cell or beside it."""
    half = tone(1.0)[::2]
    rows = [
        {"audio": {"array": half, "sampling_rate": 8_000}},
        {"audio": half.tolist(), "sampling_rate": 8_000},
    ]
    for found in utterances(*rows):
        heard = load_waveform(found)
        assert len(heard) == 16_000
        assert heard[1000:15_000] == pytest.approx(tone(1.0)[1000:15_000], abs=2e-3)
    cut = utterances({"audio": half, "sampling_rate": 8_000, "offset": 0.25, "duration": 0.5})
    assert len(load_waveform(cut[0])) == 8000


def test_floats_far_beyond_1_are_scaled_and_said(tone, caplog):
    """Float samples written as if full scale were 32768."""
    sound = tone(0.1)
    found = array_to_waveform(sound * 32_768, 16_000, "loud")
    np.testing.assert_allclose(found, sound / np.abs(sound).max(), rtol=1e-5)
    assert "loud: samples reach 983" in caplog.text


def test_bytes_in_json(tmp_path, flac):
    contents = base64.b64encode(flac(0.1)).decode()
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"audio": {"bytes": contents, "path": "a.flac"}}]))
    assert len(load_waveform(read_dataset(path)[0])) == 1600


def test_two_channels_are_averaged(tone):
    both = np.stack([tone(0.1), np.zeros(1600, np.float32)])
    for samples in (both, both.T):
        assert array_to_waveform(samples, 16_000, "a") == pytest.approx(tone(0.1) / 2)


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (np.zeros((2, 2, 2)), 16_000),
        (np.zeros(9), 0),
        (np.zeros(9), float("nan")),
        (np.zeros(9), 2**31 - 1),
        (np.array(["a"]), 16_000),
        (np.zeros(0), 16_000),
        (np.array([np.nan]), 16_000),
    ],
)
def test_what_is_no_sound(samples, rate):
    with pytest.raises(AudioError):
        array_to_waveform(samples, rate, "a")
