"""Language detection against openai-whisper's."""

import jax
import numpy as np
import pytest
from foreign_speech import FOREIGN, foreign_prompts

from flax_distil.audio.load import load_audio, pad_or_trim
from flax_distil.cache import cache_folder
from flax_distil.decode.recognizer import detect_language, encode, make_recognizer, recognize
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.tensors import to_openai
from flax_distil.options import DecodeOptions


@pytest.fixture(scope="module")
def base(base_folder):
    return make_recognizer(load_checkpoint(base_folder))


@pytest.fixture(scope="module")
def theirs(base, base_folder):
    import torch
    import whisper
    from safetensors.numpy import load_file

    tensors = load_file(base_folder / "model.safetensors")
    sizes, state = to_openai(base.spec.dims, tensors)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**sizes))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model.eval()


@pytest.fixture(scope="module")
def spoken(human_clips):
    """(language, clip of that language): English, and four others where apt has them."""
    clips = [("en", human_clips[-1][0])]
    for language in FOREIGN:
        files = foreign_prompts(language, cache_folder() / "prompts") or []
        long = [path for path in files if path.stat().st_size > 3 * 8_000]  # G.722: 8 kB a second
        clips += [(language, load_audio(path, format="g722")) for path in long[:1]]
    return clips


def test_languages_are_those_that_openai_hears(base, theirs, spoken):
    import torch
    import whisper

    waveforms = np.stack([pad_or_trim(clip) for _, clip in spoken])
    audio = encode(base.spec, base.params["encoder"], waveforms)
    ours = detect_language(base, audio)
    # One at a time: the loudest frame of a batch would set the floor for all.
    mel = torch.stack([whisper.log_mel_spectrogram(waveform) for waveform in waveforms])
    _, expected = theirs.detect_language(mel)
    for row, other in zip(ours, expected, strict=True):
        # Log-mel and encoder differ by float32's rounding.
        assert row == pytest.approx(other, abs=2e-4)
        assert max(row, key=row.get) == max(other, key=other.get)
    found = [max(row, key=row.get) for row in ours]
    right = np.mean([one == language for one, (language, _) in zip(found, spoken, strict=True)])
    assert right >= 0.8
    assert len(set(found)) > 1 or len(spoken) == 1
    (hypothesis,) = recognize(base, waveforms[:1], DecodeOptions(max_tokens=4))
    assert hypothesis.language == "en"


def test_it_sums_to_one_and_follows_the_audio(base):
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((2, 1500, 512), np.float32)
    rows = detect_language(base, jax.numpy.asarray(audio))
    np.testing.assert_allclose([sum(row.values()) for row in rows], 1, atol=1e-5)
    assert rows[0] != rows[1]
