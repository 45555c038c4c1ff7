"""From the labeller's encoder to training that has none: every clip is encoded once."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from flax_distil.audio.load import encode_flac
from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DistillConfig,
    FilterConfig,
    PseudoLabelConfig,
    ValidationConfig,
)
from flax_distil.data.mixing import training_sources
from flax_distil.data.utterances import read_dataset
from flax_distil.data.windows import window_batches
from flax_distil.decode.recognizer import listen, make_recognizer
from flax_distil.distill import encode_once
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.pseudo_label import filter as choosing
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
    states, labels, chosen = (tmp_path / name for name in ("states", "labels", "chosen"))
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
    choosing.run(FilterConfig(labels, chosen, max_wer=None, max_duration=1.1))
    return DistillConfig(
        teacher,
        student,
        tmp_path / "run",
        (chosen,),
        audio_states=states,
        compute=ComputeConfig(dtype="float32"),
        validation=ValidationConfig(batch_size=2),
    )


def kept(run: DistillConfig) -> np.ndarray:
    teacher, student = load_checkpoint(run.teacher), load_checkpoint(run.student)
    sources = training_sources(run, load_tokens(student.source))
    states = encode_once.kept_states(run, teacher, student, sources)
    assert states is not None
    return states.read(range(len(states.seconds)))


def test_the_labellers_states_are_found_through_the_filter(run, monkeypatch):
    recognizer = make_recognizer(load_checkpoint(run.teacher))
    (windows,) = window_batches(read_dataset(run.labels[0]).since(0), 2)
    assert [one.id for one in windows.utterances] == ["4.flac", "5.flac"]
    heard = listen(recognizer.spec, recognizer.params["encoder"], windows.waveforms)
    expected = np.asarray(heard).astype(ml_dtypes.bfloat16)

    def encodes(*_):
        raise AssertionError("the encoder ran again")

    with monkeypatch.context() as patched:
        patched.setattr(encode_once, "listen", encodes)
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
