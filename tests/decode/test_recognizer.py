"""What a recogniser accepts and returns, and what it compiles."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_distil.audio.log_mel import log_mel
from flax_distil.decode.recognizer import (
    AudioStates,
    decode,
    encode_audio,
    make_recognizer,
    recognize,
)
from flax_distil.decode.search import Window
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import DecodeOptions


@pytest.fixture(scope="module")
def random(random_folders):
    return make_recognizer(load_checkpoint(random_folders[0]))


def noise(rows: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 480_000), np.float32) / 10


def test_rows_do_not_depend_on_the_batch(random):
    options = DecodeOptions(max_tokens=8)
    waveforms = noise(3)
    together = recognize(random, waveforms, options)
    alone = [recognize(random, row[None], options)[0] for row in waveforms]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.mean_log_probability == pytest.approx(other.mean_log_probability, abs=1e-4)
        assert one.no_speech_probability == pytest.approx(other.no_speech_probability, rel=1e-3)
        assert one.language == "en"


def test_int16_is_heard_like_floats(random):
    waveforms = noise(1).clip(-1, 1)
    whole = np.round(waveforms * 32767).astype(np.int16)
    options = DecodeOptions(max_tokens=8)
    from_floats = recognize(random, np.float32(whole / 32768), options)
    assert recognize(random, whole, options)[0].tokens == from_floats[0].tokens


def test_a_batch_is_given_the_shortest_context_that_holds_it(random):
    """5 s of noise are 250 positions, whose states are those of that part of the log-mel."""
    taught = replace(random, contexts=(250, 500))
    waveforms = noise(2)
    waveforms[:, 80_000:] = 0
    states = encode_audio(taught, waveforms).model_BSD
    mel = log_mel(waveforms, 80)
    alone = random.spec.encoder(random.params["encoder"])(mel[:, :500])
    np.testing.assert_allclose(states, alone, atol=1e-5)
    options = DecodeOptions(max_tokens=4)
    found = recognize(taught, waveforms, options)
    expected = decode(random, AudioStates(alone), options, [Window("en")] * 2)
    assert [one.tokens for one in found] == [one.tokens for one in expected]

    sizes = lambda sound: encode_audio(taught, sound).model_BSD.shape[1]
    waveforms[1, 80_000] = 0.1
    assert sizes(waveforms) == 500
    assert sizes(np.zeros_like(waveforms)) == 250
    assert sizes(noise(2)) == 1500
    frames = np.zeros((2, 3000, 80), np.float32)
    frames[0, 999] = 1
    assert sizes(frames) == 500
    assert encode_audio(random, waveforms).model_BSD.shape[1] == 1500


def test_wrong_input_is_refused(random):
    assert recognize(random, np.zeros((0, 480_000), np.float32), DecodeOptions()) == []
    with pytest.raises(InputError, match="5 samples: pad or trim them to 480000"):
        recognize(random, np.zeros((1, 5), np.float32), DecodeOptions())
    with pytest.raises(InputError, match='did you mean "english"'):
        recognize(random, noise(1), language="englisch")
    with pytest.raises(InputError, match="English-only checkpoint cannot transcribe German"):
        recognize(random, noise(1), language="de")


def test_added_words_are_written_and_padding_is_not(random_folders, tmp_path):
    """A row of the embedding that is larger than a written token's wins its place."""
    base = load_checkpoint(random_folders[0])
    tokenizer = json.loads((base.source / "tokenizer.json").read_text())
    word = {"id": 51_864, "content": " poundkey", "special": False}
    tokenizer["added_tokens"].append(word)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = DecodeOptions(max_tokens=6)
    before = recognize(make_recognizer(base), noise(1), options)[0]
    decoder = base.params["decoder"]
    embedding_VD = decoder["tokens"]["embedding"]
    row_D = embedding_VD[before.tokens[0]]
    more = np.concatenate([embedding_VD, [1.5 * row_D, 3 * row_D, 3 * row_D]])

    def with_rows(rows, source):
        params = base.params | {"decoder": decoder | {"tokens": {"embedding": more[:rows]}}}
        dims = replace(base.dims, vocab=rows)
        return make_recognizer(replace(base, dims=dims, params=params, source=source))

    written = recognize(with_rows(51_867, tmp_path), noise(1), options)[0]
    assert written.tokens[0] == 51_864
    assert written.text.startswith("poundkey")
    assert max(written.tokens) == 51_864  # those behind it are padding
    padded = recognize(with_rows(51_867, base.source), noise(1), options)[0]
    assert padded.tokens == before.tokens


def test_heads_of_layers_that_a_student_lacks_are_left_out(random_folders):
    """As published students have them, copied from their teachers."""
    student = load_checkpoint(random_folders[1])
    for heads, kept in (([[0, 1], [7, 0]], ((0, 1),)), ([[7, 0]], ()), (None, ())):
        generation = student.generation | {"alignment_heads": heads}
        found = make_recognizer(replace(student, generation=generation))
        assert found.alignment_heads == kept


def test_a_tokenizer_of_another_model_is_refused(random_folders, base_folder):
    """Also where no file beside it names the model's."""
    student = load_checkpoint(random_folders[1])
    with pytest.raises(InputError, match="at 50363, the generation config at 50362"):
        make_recognizer(replace(student, source=base_folder))


def test_what_the_checkpoint_suppresses_is_suppressed(random_folders):
    student = load_checkpoint(random_folders[1])
    generation = student.generation | {"suppress_tokens": [5, 6]}
    assert make_recognizer(replace(student, generation=generation)).tokens.suppressed == (5, 6)


@pytest.mark.parametrize(
    "search",
    [
        {"max_tokens": 300},  # more than the longest prompt leaves room for
        {"max_tokens": 8, "timestamps": True},
        {"max_tokens": 8, "beams": 2},
        {"max_tokens": 8, "temperature": 0.5, "best_of": 2},
    ],
    ids=["greedy", "timestamps", "beams", "drawn"],
)
def test_other_clips_compile_nothing(random, compilations, search):
    """Three clips or four, other sound, texts before of any length that one bucket holds."""
    temperature = search.get("temperature", 0.0)
    options = DecodeOptions(**{k: v for k, v in search.items() if k != "temperature"})
    audio_BSD = jax.numpy.asarray(np.random.default_rng(0).normal(size=(4, 1500, 16)), "float32")

    def read(rows: int, *lengths: int) -> None:
        tokens = np.random.default_rng(rows).integers(300, 5000, max(lengths))
        before = [tuple(map(int, tokens[:length])) for length in lengths]
        windows = [Window("en", one, temperature, seed=rows) for one in before]
        decode(random, AudioStates(audio_BSD * rows), options, windows)
        recognize(random, noise(rows) * rows, options, temperature=temperature)

    read(4, 70, 80, 90, 100)
    assert compilations
    compilations.clear()
    read(3, 223, 150, 223)
    read(4, 223, 223, 223, 223)
    read(3, 81, 71, 200)
    assert not compilations
    recognize(random, noise(5), options, temperature=temperature)
    assert compilations[-1] == ("jit(beam)" if "beams" in search else "jit(greedy)")
