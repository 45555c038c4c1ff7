"""Beam search against openai-whisper's, token by token."""

import numpy as np
import pytest
import whisper

from flax_distil.decode.recognizer import Recognizer, check_memory, make_recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import PUBLISHED
from flax_distil.model.spec import Spec
from flax_distil.options import DecodeOptions
from flax_distil.text.tokens import load_tokens


@pytest.fixture(scope="module")
def random(random_folders):
    return make_recognizer(load_checkpoint(random_folders[0]))


@pytest.fixture(scope="module")
def openai_random(random_folders):
    import torch
    from safetensors.numpy import load_file

    from flax_distil.model.tensors import to_openai

    dims = load_checkpoint(random_folders[0]).dims
    tensors = load_file(random_folders[0] / "model.safetensors")
    sizes, state = to_openai(dims, tensors)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()


def openai_writes(model, waveforms, **options):
    """One window at a time: openai-whisper's beams take no batch."""
    options = whisper.DecodingOptions(language="en", fp16=False, **options)
    return [
        whisper.decode(model, whisper.log_mel_spectrogram(waveform), options)
        for waveform in waveforms
    ]


@pytest.mark.parametrize(
    "options",
    [
        dict(beam_size=3, without_timestamps=True),
        dict(beam_size=3, patience=2.0, length_penalty=0.6),
        dict(beam_size=2, prompt="It went well.", prefix="So", without_timestamps=True),
    ],
)
def test_a_random_model_searches_like_openai(random, openai_random, options):
    noise = 0.1 * np.random.default_rng(1).standard_normal((2, 480_000), np.float32)
    theirs = openai_writes(openai_random, noise, sample_len=12, **options)
    ours = recognize(
        random,
        noise,
        DecodeOptions(
            timestamps="without_timestamps" not in options,
            max_tokens=12,
            beams=options["beam_size"],
            patience=options.get("patience", 1.0),
            length_penalty=options.get("length_penalty"),
            prefix=options.get("prefix"),
        ),
        prompt=options.get("prompt"),
    )
    prefix = options.get("prefix", "")  # theirs leave it out of the result
    skipped = len(random.tokens.encode(" " + prefix)) if prefix else 0
    assert [list(one.tokens[skipped:]) for one in ours] == [one.tokens for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.text == (prefix + random.tokens.decode(other.tokens)).strip()
        assert one.mean_log_probability == pytest.approx(other.avg_logprob, abs=1e-3)
        assert one.no_speech_probability == pytest.approx(other.no_speech_prob, rel=1e-2)


def test_real_speech_is_searched_as_openai_does(tiny_en, openai_tiny_en, windows):
    theirs = openai_writes(openai_tiny_en, windows, beam_size=4, patience=1.5, sample_len=40)
    ours = recognize(
        tiny_en, windows, DecodeOptions(timestamps=True, max_tokens=40, beams=4, patience=1.5)
    )
    assert [list(one.tokens) for one in ours] == [one.tokens for one in theirs]


def test_a_search_that_no_memory_holds_is_refused(monkeypatch, tiny_en_folder):
    tokens = load_tokens(tiny_en_folder)
    monkeypatch.setattr("flax_distil.decode.recognizer.device_memory", lambda: 16 * 2**30)
    large = Recognizer(Spec(PUBLISHED["large-v2"]), {"any": np.zeros(1)}, tokens)
    check_memory(large, 8, DecodeOptions(beams=5))
    with pytest.raises(
        InputError, match=r"100 texts for each of 32 .* have 16: follow at most \d+"
    ):
        check_memory(large, 32, DecodeOptions(beams=100))
    with pytest.raises(InputError, match="2 texts for each of 8"):
        check_memory(large, 8, DecodeOptions(beams=2, patience=1e9))
    check_memory(large, 8, DecodeOptions(max_tokens=10**9))  # a search ends with the context
    with pytest.raises(InputError, match="patience is inf"):
        DecodeOptions(beams=2, patience=float("inf"))
    with pytest.raises(InputError, match=r"patience of at least 0\.5"):
        DecodeOptions(beams=2, patience=0.1)
    with pytest.raises(InputError, match="must be from 0 to 1"):
        DecodeOptions(length_penalty=2.0)
