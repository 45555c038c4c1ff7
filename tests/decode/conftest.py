"""Recognisers with real weights, and Transformers on the same audio."""

from functools import cache

import jax
import numpy as np
import pytest

from flax_distil.audio.load import pad_or_trim
from flax_distil.decode import recognizer
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.model.checkpoint import load_checkpoint


@pytest.fixture(scope="session")
def tiny_en(tiny_en_folder):
    return make_recognizer(load_checkpoint(tiny_en_folder))


@pytest.fixture(scope="session")
def windows(human_clips):
    """A telephone prompt and an audiobook clip in windows of 30 s."""
    clips = [human_clips[0], human_clips[-1]]
    return np.stack([pad_or_trim(waveform) for waveform, _ in clips])


@pytest.fixture(scope="session")
def transformers_writes():
    """(folder, windows, options of `generate`) -> rows of tokens, prompt and end removed."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    load = cache(lambda folder: WhisperForConditionalGeneration.from_pretrained(folder).eval())

    def write(folder, windows, tokens=60, **options) -> list[list[int]]:
        model = load(folder)
        extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        features = extractor(list(windows), sampling_rate=16_000, return_tensors="pt")
        rows = model.generate(features.input_features, max_new_tokens=tokens, **options).tolist()
        end, text = model.config.eos_token_id, 50_362 if model.config.vocab_size == 51_864 else 0
        written = []
        for row in rows:
            row = row[row.index(text) + 1 :] if text in row else row
            written.append(row[: row.index(end)] if end in row else row)
        return written

    return write


@pytest.fixture(autouse=True)
def strict_arrays(monkeypatch):
    """No array is broadcast to a higher rank, and a search moves none to or from the device."""

    def guarded(search):
        def call(*arguments, **options):
            with jax.transfer_guard("disallow"):
                return search(*arguments, **options)

        return call

    for name in ("greedy", "beam", "speculative"):
        monkeypatch.setattr(recognizer, name, guarded(getattr(recognizer, name)))
    with jax.numpy_rank_promotion("raise"):
        yield
