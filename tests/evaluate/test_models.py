"""Other libraries as rows of an evaluation: the same weights give the same texts."""

import numpy as np
import pytest

from flax_distil.audio.load import pad_or_trim
from flax_distil.config import ExportConfig
from flax_distil.errors import InputError
from flax_distil.evaluate.models import ClipBatch, FlaxModel, Model, RecordingBatch, load_model
from flax_distil.export import formats
from flax_distil.options import ChunkedOptions, SequentialOptions
from flax_distil.text.normalize import normalizer
from flax_distil.text.wer import word_errors


@pytest.fixture(scope="module")
def sources(tiny_en_folder, tmp_path_factory) -> dict[str, str]:
    """tiny.en in the format of every library."""
    folder = tmp_path_factory.mktemp("formats")
    formats.run(
        ExportConfig(str(tiny_en_folder), folder, format=("transformers", "openai", "ctranslate2"))
    )
    return {
        "ours": str(tiny_en_folder),
        "transformers": f"transformers:{folder}/transformers",
        "openai-whisper": f"openai-whisper:{folder}/openai/model.pt",
        "faster-whisper": f"faster-whisper:{folder}/ctranslate2",
    }


@pytest.fixture(scope="module")
def models(sources) -> dict[str, Model]:
    return {name: load_model(name, source, "float32") for name, source in sources.items()}


def test_every_library_returns_the_same_greedy_text(models, human_clips):
    """tiny.en on four clips of two people. A borderline token may differ: one word of all."""
    clips = [waveform for waveform, _ in (*human_clips[:2], *human_clips[-2:])]
    windows = np.stack([pad_or_trim(clip) for clip in clips])
    texts = {
        name: " ".join(one.text for one in model.recognize(ClipBatch(windows, "en")))
        for name, model in models.items()
    }
    words = [text.split() for text in texts.values()]
    assert len(words[0]) > 30
    for name, text in texts.items():
        assert word_errors([texts["ours"]], [text]).errors <= 1, name
    # openai-whisper and Transformers differ in whether they count the encoder's fixed positions.
    sizes = [model.parameters for model in models.values()]
    assert max(sizes) - min(sizes) in (0, 1500 * 384)


def test_every_library_reads_a_prompt(models, human_clips):
    """The same prompt: still nearly the same text, of the prompt nothing."""
    waveform, text = human_clips[0]
    windows = pad_or_trim(waveform)[None]
    for name, model in models.items():
        (output,) = model.recognize(
            ClipBatch(windows, "en", ["Zanzibar and Timbuktu are far away."])
        )
        assert "Zanzibar" not in output.text, name
        reference, given = normalizer("en")(text), normalizer("en")(output.text)
        assert word_errors([reference], [given]).rate < 0.4, name


@pytest.mark.parametrize("method", [SequentialOptions(), ChunkedOptions()])
def test_every_library_transcribes_a_recording(models, human_clips, method):
    """Clips of one speaker in a row, over 30 s, by each library's own algorithm."""
    pause, chosen, texts = np.zeros(8_000, np.float32), [], []
    for waveform, text in human_clips:
        chosen += [waveform, pause]
        texts.append(text)
        if sum(map(len, chosen)) > 35 * 16_000:
            break
    reference, rates = normalizer("en")(" ".join(texts)), {}
    for name, model in models.items():
        result = model.transcribe(RecordingBatch([np.concatenate(chosen)], "en", method, 2))
        if result is None:
            assert (name, type(method)) == ("openai-whisper", ChunkedOptions)
            continue
        rates[name] = word_errors([reference], [normalizer("en")(result[0])]).rate
    # In chunks without timestamps tiny.en loses sentences behind a pause, in every library.
    assert rates["ours"] <= rates["transformers"] + 0.05, rates
    if isinstance(method, SequentialOptions):
        assert max(rates.values()) < 0.25, rates


def test_an_assistant_changes_no_text(sources, tiny_en_folder, human_clips):
    alone, helped = (
        load_model("m", sources["ours"], "float32", assistant)
        for assistant in (None, str(tiny_en_folder))
    )
    windows = pad_or_trim(human_clips[0][0])[None]
    texts = [model.recognize(ClipBatch(windows, "en"))[0].text for model in (alone, helped)]
    assert texts[0] == texts[1] != ""
    assert isinstance(helped, FlaxModel)
    assert helped.acceptance is not None
    assert helped.acceptance.rate > 0.9  # by itself


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match=f"faster-whisper cannot load {tmp_path}"):
        load_model("m", f"faster-whisper:{tmp_path}", "float32")
