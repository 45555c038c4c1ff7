"""What a validation set is judged by, and which sets are refused before training."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flax_distil.audio.load import SAMPLE_RATE, encode_flac
from flax_distil.config import DistillConfig, ValidationConfig
from flax_distil.data.utterances import read_dataset
from flax_distil.decode.recognizer import Recognizer
from flax_distil.decode.search import Hypothesis
from flax_distil.distill import validation
from flax_distil.distill.validation import count_errors, open_sets
from flax_distil.errors import InputError
from flax_distil.recipe import load_recipe
from flax_distil.text.tokens import load_tokens


@pytest.fixture
def tokens(random_folders):
    """Of an English-only student."""
    return load_tokens(random_folders[1])


@pytest.fixture
def clips(tmp_path):
    """Writes a manifest of clips that can be heard, unless their file is named otherwise."""
    (tmp_path / "clip.flac").write_bytes(encode_flac(np.zeros(SAMPLE_RATE, np.float32)))

    def write(*rows: dict):
        path = tmp_path / "clips.jsonl"
        whole = [{"audio": "clip.flac", "id": str(n)} | row for n, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in whole))
        return path

    return write


def asked(path, **fields) -> DistillConfig:
    return DistillConfig("", "", path, validation=ValidationConfig((path,)), **fields)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": " "}, {"text": ""}, {}], "its references are blank"),
        ([{"text": "(coughs)"}], "the normaliser leaves nothing of its references"),
        ([{"text": "Hallo", "language": "de"}], "cannot transcribe German"),
        ([{"text": "nuqneH", "language": "tlh"}], 'has no language "tlh"'),
        ([{"text": "here", "audio": "gone.flac"}], "0: .*gone.flac"),
    ],
)
def test_a_set_without_a_clip_to_judge_is_refused_at_once(clips, tokens, rows, reason):
    config = asked(clips(*rows))
    with pytest.raises(InputError, match=f"clips.jsonl has no clip with a reference .*{reason}"):
        open_sets(config, tokens)
    config = asked(clips(*rows, {"text": "Hello", "language": "en"}))
    assert list(open_sets(config, tokens)) == ["clips"]


def recognizer_of(tokens) -> Recognizer:
    """A recogniser that has a vocabulary and nothing else."""
    one = object.__new__(Recognizer)
    object.__setattr__(one, "tokens", tokens)
    return one


def recognised(monkeypatch, texts: dict[str, str]) -> None:
    """Clips of each language are recognised as its text."""

    def recognize(recognizer, waveforms, options, *, language):
        language = language or "en"
        one = Hypothesis((1,), texts[language], language, -0.1, 0.0, 1.0)
        return [one] * len(waveforms)

    monkeypatch.setattr(validation, "recognize", recognize)


def test_clips_in_languages_that_the_student_lacks_are_left_out(clips, tokens, monkeypatch, caplog):
    recognised(monkeypatch, {"en": "we went"})
    path = clips(
        {"text": "We went home", "language": "English"},
        {"text": "eins", "language": "de"},
        {"text": "wa'", "language": "tlh"},
        {"text": " "},
        {"text": "one", "audio": "gone.flac"},
    )
    counts, rate = count_errors(recognizer_of(tokens), read_dataset(path), asked(path))
    assert (counts.reference_words, counts.deletions, rate) == (3, 1, "WER")
    assert "3 clips are left out, the first: Skipped(id='1'" in caplog.text


def test_languages_without_spaces_are_judged_by_characters(clips, monkeypatch, base_folder):
    recognised(monkeypatch, {"ja": "今天天汽很好", "en": "we went"})
    every = recognizer_of(load_tokens(base_folder))
    path = clips({"text": "今天天气很好", "language": "ja"})
    counts, rate = count_errors(every, read_dataset(path), asked(path))
    assert (counts.reference_words, counts.substitutions, rate) == (6, 1, "CER")
    words = ValidationConfig((path,), error_rate="wer")
    counts, rate = count_errors(every, read_dataset(path), replace(asked(path), validation=words))
    assert (counts.reference_words, counts.substitutions, rate) == (1, 1, "WER")
    path = clips({"text": "今天天气很好", "language": "ja"}, {"text": "we went"})
    counts, rate = count_errors(every, read_dataset(path), asked(path, language="en"))
    assert (counts.reference_words, rate) == (8, "WER/CER")


def test_sets_by_configuration_split_and_column(clips, tokens, tmp_path):
    """Two columns of one manifest, and a Parquet folder's split; each with its own language."""
    path = clips({"text": "Hallo", "said": "Hello"}, {"text": "Welt", "said": "world"})
    parquet = tmp_path / "speech"
    parquet.mkdir()
    row = {"audio": "clip.flac", "text": "Hello", "id": "p"}
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([row | {"id": split}]), parquet / f"{split}.parquet")
    (parquet / "clip.flac").write_bytes((tmp_path / "clip.flac").read_bytes())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        teacher = "t"
        student = "s"
        output_dir = "r"
        [[validation.data]]
        source = "{path}"
        text_column = "said"
        language = "en"
        limit = 1
        [[validation.data]]
        source = "{parquet}"
        split = "test"
        """
    )
    sets = open_sets(load_recipe(recipe, DistillConfig), tokens)
    assert {name: [one.text for one in found] for name, found in sets.items()} == {
        "clips": ["Hello"],
        "speech-test": ["Hello"],
    }
    assert sets["speech-test"][0].id == "test"
