"""The real tokenizer files, against Transformers' and openai-whisper's tokenizers."""

import json

import pytest
import whisper.tokenizer

from flax_distil.text.tokens import load_tokens

FIXTURES = ["tiny_en_folder", "base_folder"]
TEXTS = [
    " Press 1 , then the star key ; don't wait .",  # clean-up would eat the spaces
    " Grüße aus Köln, ¿qué tal? Здравствуйте, 日本語",
    " ♪ two  spaces\n and [tags]",
]


@pytest.fixture(params=FIXTURES)
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def theirs(folder):
    from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_text_there_and_back(folder, theirs, text):
    ours = load_tokens(folder)
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode([ours.sot, *ids, ours.eot]) == text
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_timestamps_equal_openai(folder):
    ours = load_tokens(folder)
    oracle = whisper.tokenizer.get_tokenizer(ours.multilingual)
    ids = [ours.timestamp_begin, *ours.encode(" Hello there."), ours.timestamp_begin + 118]
    assert ours.decode(ids, timestamps=True) == "<|0.00|> Hello there.<|2.36|>"
    assert ours.decode(ids, timestamps=True) == oracle.decode_with_timestamps(ids)


def test_published_ids(folder):
    ours = load_tokens(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    oracle = whisper.tokenizer.get_tokenizer(ours.multilingual)
    assert ours.vocabulary == json.loads((folder / "config.json").read_text())["vocab_size"]
    assert list(ours.suppressed) == generation["suppress_tokens"]
    assert list(ours.suppressed_first) == generation["begin_suppress_tokens"] == [220, oracle.eot]
    assert set(oracle.non_speech_tokens) < set(ours.suppressed)
    assert ours.prompt("en") == [*oracle.sot_sequence_including_notimestamps]
