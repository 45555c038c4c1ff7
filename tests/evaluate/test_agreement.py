"""What two models answer at the start of transcript, side by side."""

from dataclasses import replace

import numpy as np
import pytest

from flax_distil.decode.recognizer import make_recognizer
from flax_distil.evaluate.agreement import agreement
from flax_distil.model.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def base(base_folder):
    return make_recognizer(load_checkpoint(base_folder))


def test_a_model_agrees_with_itself_and_a_broken_one_does_not(base, human_clips):
    speech = [waveform for waveform, _ in human_clips[:3]]
    same = agreement(base, base, speech, decibels=(-40.0,))
    assert same.language == 1
    assert same.no_speech == {"speech": 0, "silence": 0, "noise": 0}
    # Negative embeddings of these tokens: the likeliest language is another, no-speech is certain
    # nowhere.
    tokens, decoder = base.tokens, base.params["decoder"]
    ids = np.array([tokens.languages["en"], tokens.no_speech])
    embedding_VD = decoder["tokens"]["embedding"].at[ids].multiply(-1)
    broken = base.params | {"decoder": decoder | {"tokens": {"embedding": embedding_VD}}}
    other = agreement(base, replace(base, params=broken), speech, decibels=(-40.0,))
    assert other.language == 0
    assert other.no_speech["silence"] > 0.5
    assert "same language 0 %" in str(other)


def test_an_english_model_has_no_language_to_agree_on(random_folders):
    recognizer = make_recognizer(load_checkpoint(random_folders[0]))
    found = agreement(recognizer, recognizer, [np.zeros(16_000, np.float32)])
    assert found.language is None
    assert "language" not in str(found)
