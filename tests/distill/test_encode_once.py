"""From the labeller's encoder to training that has none: every clip is encoded once."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.audio.load import encode_flac
from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DistillConfig,
    FilterConfig,
    PseudoLabelConfig,
    TrainingDataConfig,
    ValidationConfig,
)
from flax_distil.data.mixing import training_sources
from flax_distil.data.utterances import read_dataset
from flax_distil.data.windows import window_batches
from flax_distil.decode.recognizer import encode, make_recognizer
from flax_distil.distill import encode_once
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import labeller
from flax_distil.text.tokens import load_tokens


@pytest.fixture
def run(random_folders, tmp_path) -> DistillConfig:
    """Six clips of noise labelled with their states, of which two short ones are kept."""
    speech, random = tmp_path / "speech", np.random.default_rng(0)
    speech.mkdir()
    for number in range(6):
        noise = 0.1 * random.normal(size=32_000 - 4_000 * number)
        (speech / f"{number}.flac").write_bytes(encode_flac(noise.astype(np.float32)))
    (speech / "3.flac").write_bytes(b"not audio")
    teacher, student = map(str, random_folders)
    states, labels, filtered = (tmp_path / name for name in ("states", "labels", "filtered"))
    data = DataConfig(str(speech), language="en")
    labeller.run(
        PseudoLabelConfig(
            data,
            teacher,
            labels,
            audio_states=states,
            max_tokens=2,
            batch_size=2,
            shard_size=3,
        )
    )
    # A random model never ends a text.
    filtering.run(FilterConfig(labels, filtered, max_wer=None, max_duration=1.1, keep_unended=True))
    return DistillConfig(
        teacher,
        student,
        tmp_path / "run",
        (filtered,),
        audio_states=states,
        compute=ComputeConfig(dtype="float32"),
        validation=ValidationConfig(batch_size=2),
    )


def kept(run: DistillConfig) -> np.ndarray:
    teacher, student = load_checkpoint(run.teacher), load_checkpoint(run.student)
    sources = training_sources(run, load_tokens(student.source))
    states = encode_once.kept_states(run, teacher, sources)
    assert states is not None
    return states.read(range(len(states.clips)))


def test_the_labellers_states_are_found_through_the_filter(run, monkeypatch):
    recognizer = make_recognizer(load_checkpoint(run.teacher))
    (windows,) = window_batches(read_dataset(run.labels[0]).iter_from(0), 2)
    assert [one.id for one in windows.utterances] == ["4.flac", "5.flac"]
    heard = encode(recognizer.spec, recognizer.params["encoder"], windows.waveforms)
    expected = np.asarray(heard).astype(ml_dtypes.bfloat16)

    def encodes(*_):
        raise AssertionError("the encoder ran again")

    with monkeypatch.context() as patched:
        patched.setattr(encode_once, "encode", encodes)
        np.testing.assert_array_equal(kept(run), expected)
    shutil.rmtree(run.audio_states)
    np.testing.assert_array_equal(kept(run), expected)


def test_the_same_texts_in_other_voices_have_states_of_their_own(run, random_folders, tmp_path):
    """Two manifests of clips that differ in nothing but their sound."""
    random, states = np.random.default_rng(1), []
    for name in ("quiet", "loud"):
        (tmp_path / name).mkdir()
        noise = random.normal(size=16_000).astype(np.float32)
        (tmp_path / name / "0.flac").write_bytes(encode_flac(0.1 * noise))
        row = {"audio": "0.flac", "text": "one two", "token_ids": [7, 8]}
        path = tmp_path / name / "clips.jsonl"
        path.write_text(json.dumps(row))
        states.append(kept(replace(run, labels=(path,))))
    assert not np.array_equal(*states)


def test_data_that_differ_in_anything_have_states_of_their_own(run, tmp_path, monkeypatch):
    """Two columns of sound in one manifest, its clips under other names, and another manifest of
    the same relative path, all with the same texts."""
    random = np.random.default_rng(1)
    rows = [{"id": "a", "near": "0.flac", "far": "1.flac", "text": "one", "token_ids": [7]}]
    folders = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for number in range(2):
            noise = random.normal(size=16_000).astype(np.float32)
            (tmp_path / place / f"{number}.flac").write_bytes(encode_flac(0.1 * noise))
        (tmp_path / place / "clips.jsonl").write_text(json.dumps(rows[0]))
        monkeypatch.chdir(tmp_path / place)
        for column in ("near", "far"):
            data = (TrainingDataConfig("clips.jsonl", audio_column=column, target="label"),)
            folders.append(kept(replace(run, labels=(), data=data)))
    heavier = (replace(data[0], weight=2.0),)  # the same sound
    monkeypatch.setattr(encode_once, "encode", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(kept(replace(run, labels=(), data=heavier)), folders[-1])
    assert len({one.tobytes() for one in folders}) == 4


def test_stores_of_other_sound_under_the_same_settings_have_states_of_their_own(run, tmp_path):
    """As of two runs of the labeller in two folders, each over its own `speech`."""
    first = kept(run)
    other = tmp_path / "other"
    shutil.copytree(run.labels[0], other)
    (path,) = (other / "data").glob("*.parquet")
    table = pq.read_table(path)
    moved = pa.array([value + 1 for value in table["mean_log_probability"].to_pylist()], "float32")
    at = table.schema.get_field_index("mean_log_probability")
    pq.write_table(table.set_column(at, "mean_log_probability", moved), path)
    count = lambda: sum(1 for _ in run.audio_states.rglob("*.safetensors"))
    before = count()
    np.testing.assert_array_equal(kept(replace(run, labels=(other,))), first)
    assert count() > before  # encoded, not found
