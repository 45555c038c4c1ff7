"""openai-whisper itself is the oracle: its state dict, its logits, its token tables."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.dims import PUBLISHED, WhisperDims
from flax_distil.model.generation import generation_config, special_ids
from flax_distil.model.spec import Spec
from flax_distil.model.tensors import read_openai, to_openai
from flax_distil.model.weights import to_hf

SIZES = dict(n_mels=80, n_audio_ctx=20, n_audio_state=16, n_audio_head=2, n_audio_layer=1)
SIZES |= dict(n_vocab=51_865, n_text_ctx=12, n_text_state=16, n_text_head=4, n_text_layer=2)


@pytest.fixture(scope="module")
def theirs() -> Whisper:
    """A small random model of openai-whisper."""
    model = Whisper(ModelDimensions(**SIZES))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture
def file(theirs, tmp_path):
    path = tmp_path / "small.pt"
    torch.save({"dims": SIZES, "model_state_dict": theirs.state_dict()}, path)
    return path


def test_logits_equal_openai(theirs, file):
    """float32 on both sides; 1e-4 is some ten roundings of logits around 5."""
    checkpoint = load_checkpoint(file)
    random = np.random.default_rng(0)
    mel_BTM = random.normal(size=(2, 40, 80)).astype(np.float32)
    tokens_BL = random.integers(0, 51_865, (2, 7))
    whisper = Spec(checkpoint.dims)
    encoder = whisper.encoder(checkpoint.params["encoder"])
    decoder = whisper.decoder(checkpoint.params["decoder"])
    ours = decoder.logits(decoder(jnp.asarray(tokens_BL), encoder(jnp.asarray(mel_BTM))))
    with torch.no_grad():
        mel_BMT = torch.from_numpy(mel_BTM).transpose(1, 2)
        wanted = theirs(mel_BMT, torch.from_numpy(tokens_BL)).numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert np.ptp(wanted) > 1


def test_there_and_back(theirs, file):
    _, tensors = read_openai(file)
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    sizes, state = to_openai(load_checkpoint(file).dims, arrays)
    assert sizes == SIZES
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(state[name], tensor.numpy(), err_msg=name)


def test_half_precision_becomes_float32(theirs, tmp_path):
    half = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    torch.save({"dims": SIZES, "model_state_dict": half}, tmp_path / "half.pt")
    checkpoint = load_checkpoint(tmp_path / "half.pt")
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    conv = half["encoder.conv1.weight"].float().numpy()
    np.testing.assert_array_equal(tensors["model.encoder.conv1.weight"], conv)


def test_all_faults_are_named_together(theirs, tmp_path):
    state = theirs.state_dict()
    state["decoder.extra"] = state.pop("decoder.ln.weight")
    state["encoder.conv1.bias"] = torch.zeros(3)
    torch.save({"dims": SIZES, "model_state_dict": state}, tmp_path / "bad.pt")
    with pytest.raises(InputError) as caught:
        load_checkpoint(tmp_path / "bad.pt")
    for name in ("decoder.layer_norm.weight", "decoder.extra", "encoder.conv1.bias"):
        assert name in str(caught.value)


class Harmful:
    def __reduce__(self):
        return print, ("harm done",)


def test_code_in_the_file_is_not_run(tmp_path, capsys):
    torch.save({"dims": SIZES, "model_state_dict": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "bad.pt")
    assert "harm done" not in capsys.readouterr().out


def test_other_files(theirs, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(InputError, match="'dims' or 'model_state_dict'"):
        load_checkpoint(path)
    torch.save({"dims": SIZES, "model_state_dict": {}}, path)
    with pytest.raises(InputError, match=r"lack model\.encoder\.conv1\.weight and hold nothing"):
        load_checkpoint(path)
    for odd in (None, [1], {"n_mels": 80}, SIZES | {"n_text_head": "1"}):
        torch.save({"dims": odd, "model_state_dict": theirs.state_dict()}, path)
        with pytest.raises(InputError, match=r"(lacks|has) decoder_attention_heads"):
            load_checkpoint(path)
    torch.save({"dims": SIZES, "model_state_dict": {"a": "b"}}, path)
    with pytest.raises(InputError, match="not a state dict"):
        load_checkpoint(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"flax-distil\[torch\]"):
        load_checkpoint(path)


@pytest.mark.parametrize("key", ["n_audio_layer", "n_text_layer", "n_vocab"])
def test_sizes_are_compared_with_the_tensors(theirs, tmp_path, key):
    sizes = SIZES | {key: 10_000_000}
    torch.save({"dims": sizes, "model_state_dict": theirs.state_dict()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"(layers|vocab_size) 10,000,000 and the weights"):
        load_checkpoint(tmp_path / "bad.pt")


def test_a_folder_that_holds_one_file_is_that_model(file, theirs):
    assert load_checkpoint(file.parent).dims == load_checkpoint(file).dims


def test_the_tokenizer_is_that_of_a_fetched_model(file, base_folder, theirs, caplog):
    """51,865 tokens are those of all multilingual models up to large-v2; the file has none."""
    checkpoint = load_checkpoint(file)
    assert checkpoint.source == base_folder
    assert checkpoint.tokens().multilingual


def test_odd_feed_forward_has_no_openai_form():
    dims = WhisperDims(80, 51_865, 16, 1, 2, 1, 2, 64, 48)
    with pytest.raises(InputError, match="4 x width = 64"):
        to_openai(dims, {})


@pytest.mark.parametrize("size", ["tiny.en", "base", "large-v3"])
def test_special_tokens_equal_openai(size):
    dims = PUBLISHED[size]
    languages = 100 if dims.vocab == 51_866 else 99
    tokenizer = get_tokenizer(dims.multilingual, num_languages=languages)
    ids = special_ids(dims)
    named = {f"<|{name}|>": number for name, number in ids.items()}
    special = tokenizer.special_tokens
    assert named == {name: special[name] for name in named}
    assert ids["notimestamps"] + 1 == tokenizer.timestamp_begin

    generation = generation_config(dims)
    never = {tokenizer.sot, tokenizer.sot_prev, tokenizer.sot_lm, tokenizer.no_speech}
    never |= {tokenizer.transcribe, tokenizer.translate}
    assert set(generation["suppress_tokens"]) == never | set(tokenizer.non_speech_tokens)
    assert generation["begin_suppress_tokens"] == [*tokenizer.encode(" "), tokenizer.eot]
    if dims.multilingual:
        codes = dict(zip(tokenizer.all_language_codes, tokenizer.all_language_tokens, strict=True))
        assert generation["lang_to_id"] == {f"<|{code}|>": number for code, number in codes.items()}
