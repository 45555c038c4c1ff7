"""CTranslate2's own package is the oracle: it wrote the fetched file, and it reads ours."""

import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.ctranslate2 import read_variables, write_ctranslate2, write_variables
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Spec
from flax_distil.model.weights import to_hf

DIMS = WhisperDims(
    mels=80,
    vocab=51_864,
    width=64,
    encoder_layers=1,
    encoder_heads=1,
    decoder_layers=2,
    decoder_heads=1,
    encoder_ffn=32,
    decoder_ffn=48,
)
ABSENT = {"decoder/alibi_use_positive_positions", "decoder/scale_alibi"}
HEADS = {"alignment_heads": [[1, 0]], "suppress_tokens": [1, 2], "begin_suppress_tokens": [220]}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Random tensors of DIMS that float16 holds exactly."""
    random = np.random.default_rng(0)
    make = lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float16).astype(np.float32)
    return to_hf(DIMS, jax.tree.map(make, Spec(DIMS).abstract()))


@pytest.fixture
def folder(tensors, tmp_path) -> Path:
    write_ctranslate2(tmp_path, DIMS, tensors, HEADS)
    return tmp_path


def test_what_is_written_is_read_again(folder, tensors):
    checkpoint = load_checkpoint(folder)
    assert checkpoint.dims == DIMS
    assert_same(checkpoint, tensors)
    assert {key: checkpoint.generation[key] for key in HEADS} == HEADS
    assert checkpoint.generation["no_timestamps_token_id"] == 50_362


def assert_same(checkpoint, tensors):
    found = to_hf(checkpoint.dims, checkpoint.params)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_bfloat16(tensors, tmp_path):
    write_ctranslate2(tmp_path, DIMS, tensors, {}, dtype="bfloat16")
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    assert_same(load_checkpoint(tmp_path), rounded)


def test_ctranslate2_transcribes_the_same_with_our_file(tiny_en_folder, human_clips, tmp_path):
    """The fetched weights, written by us: greedy tokens of CTranslate2 equal Transformers'."""
    import ctranslate2
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    checkpoint = load_checkpoint(tiny_en_folder)
    write_ctranslate2(
        tmp_path,
        checkpoint.dims,
        to_hf(checkpoint.dims, checkpoint.params),
        checkpoint.generation,
        dtype="float32",
    )
    tokenizer = (tiny_en_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__)]
    tokens += [token["content"] for token in json.loads(tokenizer)["added_tokens"]]
    (tmp_path / "vocabulary.json").write_text(json.dumps(tokens[:50_256] + tokens[-1_608:]))

    processor = WhisperProcessor.from_pretrained(tiny_en_folder)
    model = WhisperForConditionalGeneration.from_pretrained(tiny_en_folder)
    clips = sorted((waveform for waveform, _ in human_clips), key=len)[:2]
    mel = processor(clips, sampling_rate=16_000, return_tensors="np").input_features
    theirs = ctranslate2.models.Whisper(str(tmp_path), device="cpu", compute_type="float32")
    results = theirs.generate(
        ctranslate2.StorageView.from_array(mel), [[50_257, 50_362]] * len(clips), beam_size=1
    )
    with torch.no_grad():
        wanted = model.generate(torch.from_numpy(mel))
    for result, ids in zip(results, wanted.tolist(), strict=True):
        words = [token for token in ids if token < 50_256]
        assert [token for token in result.sequences_ids[0] if token < 50_256] == words
        assert len(words) > 5


@pytest.fixture(scope="module")
def convert(random_folders, tmp_path_factory):
    """CTranslate2's own converter, on a small random Transformers folder."""
    from ctranslate2.converters import TransformersConverter

    def run(quantization: str | None) -> Path:
        folder = tmp_path_factory.mktemp("theirs") / "model"
        converter = TransformersConverter(str(random_folders[0]))
        return Path(converter.convert(str(folder), quantization=quantization))

    return run


def test_their_converter(random_folders, convert, tmp_path):
    """We read what CTranslate2 writes of a Transformers folder, and write the same ourselves."""
    checkpoint = load_checkpoint(random_folders[0])
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    theirs = convert(None)
    found = load_checkpoint(theirs)
    assert found.dims == checkpoint.dims
    assert found.generation == checkpoint.generation
    assert_same(found, tensors)

    write_ctranslate2(tmp_path, checkpoint.dims, tensors, found.generation, dtype="float32")
    ours, wanted = (read_variables(folder / "model.bin") for folder in (tmp_path, theirs))
    # Two switches of other architectures, zero here, which older files lack as well.
    assert wanted.keys() - ours.keys() <= ABSENT
    assert ours.keys() <= wanted.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)
        assert ours[name].dtype == wanted[name].dtype, name


@pytest.mark.parametrize("quantization", ["int8", "int16"])
def test_their_integers_are_multiplied_out(random_folders, convert, quantization):
    checkpoint = load_checkpoint(random_folders[0])
    converted = load_checkpoint(convert(quantization))
    found = to_hf(converted.dims, converted.params)
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    # Half a level; q, k and v are fused and share a scale, so the loudest tensor decides.
    level = max(np.abs(tensor).max() for tensor in tensors.values())
    level /= {"int8": 127, "int16": 1024}[quantization]
    for name, tensor in tensors.items():
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=0.5001 * level, err_msg=name)


def test_integers_without_scale(folder):
    name = "encoder/layer_0/ffn/linear_0/weight"
    _replace(folder / "model.bin", {name: np.ones((32, 64), np.int8)})
    with pytest.raises(InputError, match=f"{name}_scale"):
        load_checkpoint(folder)


def test_biased_keys_are_refused(folder):
    name = "decoder/layer_1/self_attention/linear_0/bias"
    _replace(folder / "model.bin", {name: np.ones(3 * 64, np.float32)})
    with pytest.raises(InputError, match=r"unknown model\.decoder\..*k_proj\.bias"):
        load_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 3, 11, 40, 5_000, -1])
def test_cut_off(folder, length):
    path = folder / "model.bin"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="cut off"):
        load_checkpoint(folder)


def test_empty_lists_stay_empty_and_heads_are_pairs(folder):
    path = folder / "config.json"
    facts = {"suppress_ids": [], "suppress_ids_begin": [], "alignment_heads": []}
    path.write_text(json.dumps(facts))
    generation = load_checkpoint(folder).generation
    assert all(generation[key] == [] for key in HEADS)
    for odd in ([[1]], [1], "x", [[1, "0"]]):
        path.write_text(json.dumps(facts | {"alignment_heads": odd}))
        with pytest.raises(InputError, match="alignment_heads"):
            load_checkpoint(folder)


def test_a_damaged_rank_is_called_so(folder):
    """numpy has no arrays of more than 64 dimensions."""
    path, name = folder / "model.bin", b"encoder/num_heads\0"
    data = path.read_bytes()
    at = data.index(name) + len(name)
    assert data[at] == 0
    ones = struct.pack("<65I", *[1] * 65)
    path.write_bytes(data[:at] + b"\x41" + ones + data[at + 1 :])
    with pytest.raises(InputError, match=r"is damaged .* 65"):
        load_checkpoint(folder)


def test_other_files(folder):
    path = folder / "model.bin"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"WhisperSpec\0", b"WhisperSpoc\0"))
    with pytest.raises(InputError, match="'WhisperSpoc'"):
        load_checkpoint(folder)
    path.write_bytes(struct.pack("<I", 7) + data[4:])
    with pytest.raises(InputError, match=r"revision \(7, "):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    path.write_bytes(data)
    with pytest.raises(InputError, match="not JSON"):
        load_checkpoint(folder)


def _replace(path: Path, changed: dict[str, np.ndarray]) -> None:
    """Rewrite the file with some variables changed or added."""
    write_variables(path, read_variables(path) | changed)
