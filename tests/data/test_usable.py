"""Rows that cannot be learnt are left out and counted; clips without speech are drawn apart."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_batches import ENGLISH, MULTILINGUAL

from flax_distil.config import DistillConfig, TrainingDataConfig
from flax_distil.data.batches import language_reason
from flax_distil.data.loader import Loader, LoaderState
from flax_distil.data.mixing import draw_sources, training_sources
from flax_distil.errors import InputError


@pytest.fixture
def manifest(tmp_path, flac):
    """`manifest(row, ...)`: a list of clips with these labels or texts."""

    def write(*rows, name="list.jsonl"):
        lines = []
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.flac").write_bytes(flac(0.2))
            lines.append({"audio": f"{number}.flac", "duration": 0.2, "language": "en"} | row)
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


def configured(*tables, **fields) -> DistillConfig:
    data = tuple(TrainingDataConfig(**table) for table in tables)
    return DistillConfig("teacher", "student", Path("run"), data=data, **fields)


def test_one_row_never_ends_a_run(manifest, caplog):
    """A language the checkpoint lacks, one nobody knows, a missing label, a label of 803 tokens."""
    path = manifest(
        {"token_ids": [7]},
        {"token_ids": [7], "language": "yue"},
        {"token_ids": [7], "language": "tlh"},
        {"token_ids": [7] * 803},
        {"token_ids": None},
        {"token_ids": [7, 8], "language": "German"},
    )
    (source,) = training_sources(configured({"source": str(path)}), MULTILINGUAL)
    assert [one.id for one in source.utterances] == ["0.flac", "5.flac"]
    assert source.lengths.tolist() == [1, 2]
    assert "4 of 6 rows are left out" in caplog.text
    for reason in (
        "and Cantonese is not among them: use large-v3 or a model made from it (1, first 1.flac)",
        'has no language "tlh"',
        "over 444 tokens, which is all that a label bucket holds (1, first 3.flac)",
        "no label to learn (1, first 4.flac)",
    ):
        assert reason in caplog.text
    ((batch, _),) = islice(Loader((source,), MULTILINGUAL, 8).batches(LoaderState()), 1)
    assert (batch.seconds > 0).all()


def test_what_the_end_of_silence_and_windows_need(manifest, caplog):
    """A prompt with a language; labels that ended."""
    rows = [{"token_ids": [7], "speaker": "a", "ended": n != 1, "speech": n < 3} for n in range(4)]
    path = str(manifest(*rows, {"token_ids": [7], "speech": False, "language": None}))
    speech, silence = training_sources(configured({"source": path}, non_speech="end"), MULTILINGUAL)
    assert (len(speech.utterances), len(silence.utterances)) == (3, 1)
    assert "no language is named (1, first 4.flac)" in caplog.text
    windows, _ = training_sources(configured({"source": path, "pack_seconds": 9.0}), MULTILINGUAL)
    assert [part.id for part in windows.utterances[0].parts] == ["0.flac", "2.flac"]
    assert "a label that was cut, which cannot be packed" in caplog.text


def test_nothing_left_is_an_error_that_says_why(manifest):
    path = manifest({"token_ids": [7], "language": "yue"}, {"token_ids": None})
    with pytest.raises(
        InputError, match=r"none of the 2 rows .* Cantonese is not among .* no label"
    ):
        training_sources(configured({"source": str(path)}), MULTILINGUAL)


def test_the_row_before_is_not_one_that_was_left_out(manifest):
    rows = [{"token_ids": ids, "speaker": "a"} for ids in ([1], [2], None, [4], [5])]
    (source,) = training_sources(configured({"source": str(manifest(*rows))}), MULTILINGUAL)
    assert [one.token_ids for one in source.utterances] == [(1,), (2,), (4,), (5,)]
    assert source.follows.tolist() == [False, True, False, True]


def test_clips_without_speech_are_a_share_of_the_examples(manifest):
    speech = manifest({"text": "yes"}, {"text": "no"}, {"text": ""}, name="speech.jsonl")
    noise = manifest({}, {}, {}, {}, name="noise.jsonl")
    tables = ({"source": str(speech), "weight": 6.0}, {"source": str(noise), "speech": False})
    sources = training_sources(configured(*tables, non_speech_share=0.25), MULTILINGUAL)
    assert [(one.speech, len(one.utterances)) for one in sources] == [
        (True, 2),
        (False, 1),
        (False, 4),
    ]
    drawn = [one for one, _ in islice(draw_sources([s.weight for s in sources], 0, 0), 8_000)]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares[0] == pytest.approx(0.75, abs=0.02)  # 4 standard deviations
    by_hours = training_sources(configured(*tables), MULTILINGUAL)
    assert [one.weight for one in by_hours] == pytest.approx([4, 2, 4 * 0.2 / 3600])
    none = training_sources(configured(*tables, non_speech_share=0.0), MULTILINGUAL)
    assert [one.speech for one in none] == [True]
    with pytest.raises(InputError, match="no dataset has clips without speech"):
        training_sources(
            configured({"source": str(speech), "limit": 2}, non_speech_share=0.1), MULTILINGUAL
        )
    with pytest.raises(InputError, match="non_speech_share 1 must be"):
        training_sources(configured(*tables, non_speech_share=1.0), MULTILINGUAL)


def test_a_batch_of_both_kinds(manifest):
    rows = [{"token_ids": [7], "speech": n > 0} for n in range(2)]
    sources = training_sources(
        configured({"source": str(manifest(*rows))}, non_speech="no_speech"), MULTILINGUAL
    )
    ((batch, _),) = islice(Loader(sources, MULTILINGUAL, 16).batches(LoaderState()), 1)
    silent = batch.rows == 1  # the first row of the second source
    assert 0 < silent.sum() < 16
    assert (batch.targets[silent, 0] == MULTILINGUAL.no_speech).all()
    assert (batch.weights[silent].sum(axis=1) == 1).all()
    assert (batch.weights[~silent].sum(axis=1) == 5).all()


def test_languages_of_a_checkpoint():
    assert language_reason("en-US", MULTILINGUAL) is None
    assert language_reason(None, MULTILINGUAL) == "no language is named"
    assert language_reason(None, ENGLISH) is None
    assert language_reason("de", ENGLISH) == (
        "an English-only checkpoint cannot transcribe German: use a multilingual one"
    )
