"""What two models answer at the start of transcript, side by side."""

from dataclasses import replace

import numpy as np
import pytest

from flax_distil.audio.load import CLIP_SAMPLES, pad_or_trim
from flax_distil.audio.noise import white_noise
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.evaluate.models import ClipBatch, FlaxModel, load_model
from flax_distil.evaluate.results import Output
from flax_distil.evaluate.scores import agreement
from flax_distil.model.checkpoint import load_checkpoint


def test_a_model_agrees_with_itself_and_a_broken_one_does_not(base_folder, human_clips):
    base = make_recognizer(load_checkpoint(base_folder))
    # Negative embeddings of these tokens: the likeliest language is another, no-speech is certain
    # nowhere.
    tokens, decoder = base.tokens, base.params["decoder"]
    ids = np.array([tokens.languages["en"], tokens.no_speech])
    embedding_VD = decoder["tokens"]["embedding"].at[ids].multiply(-1)
    broken = base.params | {"decoder": decoder | {"tokens": {"embedding": embedding_VD}}}
    models = [FlaxModel("m", "", one) for one in (base, replace(base, params=broken))]
    sounds = [waveform for waveform, _ in human_clips[:2]]
    sounds += [0.01 * white_noise(0, CLIP_SAMPLES), np.zeros(CLIP_SAMPLES, np.float32)]
    batch = ClipBatch(np.stack([*map(pad_or_trim, sounds)]), "en", max_tokens=1)
    same, other = (model.recognize(batch) for model in models)
    assert agreement(same, same) == (100, 0)
    assert agreement(same[:2], other[:2]).language == 0
    assert (agreement(same[3:], other[3:]).no_speech or 0) > 0.5


def test_an_english_model_has_no_language_to_agree_on(random_folders):
    model = load_model("m", str(random_folders[0]), "float32")
    outputs = model.recognize(ClipBatch(np.zeros((1, CLIP_SAMPLES), np.float32), "en"))
    assert agreement(outputs, outputs) == (None, 0)


def test_agreement_by_hand():
    """Clips of which a model tells nothing are left out; the median of 0.1, 0.2 and 0.6 is 0.2."""
    first = [Output(text="", detected="en", no_speech_probability=p) for p in (0.1, 0.2, 0.6)]
    second = [
        Output(text="", detected=code, no_speech_probability=0.0) for code in ("en", "de", "en")
    ]
    known = agreement([*first, Output(text="")], [*second, Output(text="")])
    assert known.language == pytest.approx(200 / 3)
    assert known.no_speech == pytest.approx(0.2)
