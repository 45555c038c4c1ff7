"""Transformers is the oracle: it loads what we write and writes what we load."""

import errno
import json
import logging
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flax_distil.errors import InputError
from flax_distil.model import checkpoint as module
from flax_distil.model.checkpoint import load_checkpoint, save_checkpoint
from flax_distil.model.processor import copy_processor, write_tokenizer
from flax_distil.model.weights import to_hf


@pytest.fixture
def teacher(random_folders):
    return load_checkpoint(random_folders[0])


def tensors_of(checkpoint):
    return to_hf(checkpoint.dims, checkpoint.params)


def assert_same(left, right, cast=np.float32):
    right = tensors_of(right)
    for name, tensor in tensors_of(left).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, right[name].astype(cast), err_msg=name)


def test_transformers_loads_what_we_write(tiny_en_folder):
    """Real weights: no key is missing or too many, and the projection is tied."""
    from transformers import WhisperForConditionalGeneration

    model, report = WhisperForConditionalGeneration.from_pretrained(
        tiny_en_folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_760_256
    assert model.generation_config.no_timestamps_token_id == 50_362
    assert getattr(model.generation_config, "forced_decoder_ids", None) is None
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*generation_config.*")
def test_the_pipeline_uses_it_as_it_is(tiny_en_folder, human_clips):
    import jiwer
    from transformers import pipeline

    recognise = pipeline("automatic-speech-recognition", model=str(tiny_en_folder))
    waveform, text = min(human_clips, key=lambda clip: len(clip[0]))
    result = recognise({"raw": waveform, "sampling_rate": 16_000}, return_timestamps=True)
    assert result["chunks"][-1]["timestamp"][1] <= len(waveform) / 16_000 + 0.5
    normalise = recognise.tokenizer.normalize
    assert jiwer.wer(normalise(text), normalise(result["text"])) < 0.3


@pytest.mark.parametrize("bare", [False, True])
def test_tokenizer_equals_openai(tiny_en_folder, base_folder, tmp_path, bare):
    """bare: all files made from a tokenizer.json without timestamps, as CTranslate2 has it."""
    from transformers import WhisperProcessor
    from whisper.tokenizer import get_tokenizer

    text = " The naïve café, at 5:30 p.m.: «Straße» 你好 … I'd don't 日本\n  two  spaces ♪"
    for folder, multilingual in ((tiny_en_folder, False), (base_folder, True)):
        if bare:
            whole = json.loads((folder / "tokenizer.json").read_text())
            whole["added_tokens"] = [one for one in whole["added_tokens"] if one["special"]]
            source, made = tmp_path / f"{folder.name}-bare", tmp_path / folder.name
            source.mkdir()
            made.mkdir()
            (source / "tokenizer.json").write_text(json.dumps(whole))
            copy_processor(source, made, load_checkpoint(folder).dims)
            assert (made / "merges.txt").read_text().splitlines()[1] == "Ġ t"
            vocabulary = json.loads((made / "vocab.json").read_text())
            assert vocabulary == whole["model"]["vocab"]
            folder = made
        tokenizer = WhisperProcessor.from_pretrained(folder).tokenizer
        theirs = get_tokenizer(multilingual, num_languages=99)
        ids = theirs.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_tokens_to_ids("<|0.00|>") == theirs.timestamp_begin
        assert tokenizer.convert_tokens_to_ids("<|30.00|>") == theirs.timestamp_begin + 1500
        assert tokenizer.all_special_ids[-1] + 1 == theirs.timestamp_begin
        assert tokenizer.normalize("The colour of 2 tyres") == "the color of 2 tires"
        stamped = [theirs.timestamp_begin + 54, *theirs.encode(" Hello."), theirs.eot]
        assert tokenizer.decode(stamped, decode_with_timestamps=True).startswith("<|1.08|> Hello.")
        assert tokenizer.decode(stamped, skip_special_tokens=True) == " Hello."


def test_alignment_heads_equal_openai(tiny_en_folder, base_folder):
    import whisper
    from whisper.model import ModelDimensions, Whisper

    for folder, name in ((tiny_en_folder, "tiny.en"), (base_folder, "base")):
        checkpoint = load_checkpoint(folder)
        heads, layers = checkpoint.dims.decoder_heads, checkpoint.dims.decoder_layers
        model = Whisper(ModelDimensions(80, 2, 8, 1, 1, 100, 2, 4 * heads, heads, layers))
        model.set_alignment_heads(whisper._ALIGNMENT_HEADS[name])
        chosen = model.alignment_heads.coalesce().indices().T.tolist()
        assert checkpoint.generation["alignment_heads"] == chosen


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_loaded(teacher, tmp_path, dtype):
    save_checkpoint(teacher, tmp_path / "new", dtype)
    again = load_checkpoint(tmp_path / "new")
    assert_same(again, teacher, cast=jnp.dtype(dtype))
    assert again.dims == teacher.dims
    assert again.generation == teacher.generation
    assert again.config["dtype"] == dtype
    assert oct((tmp_path / "new" / "model.safetensors").stat().st_mode)[-3:] != "600"


def test_shards(teacher, random_folders, tmp_path):
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(random_folders[0])
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(load_checkpoint(tmp_path), teacher)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"has 1 of 2 shards"):
        load_checkpoint(tmp_path)


def test_bfloat16_of_transformers(teacher, random_folders, tmp_path):
    import torch
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(random_folders[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same(load_checkpoint(tmp_path), teacher, cast=jnp.bfloat16)


def test_wrong_keys_are_all_named(teacher, tmp_path):
    folder = tmp_path / "model"
    save_checkpoint(teacher, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.mystery"] = tensors.pop("model.decoder.layer_norm.bias")
    tensors["model.encoder.conv2.bias"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    for name in ("decoder.mystery", "decoder.layer_norm.bias", "encoder.conv2.bias"):
        assert name in str(caught.value)


def test_damage_and_pickles(teacher, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_checkpoint(teacher, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as PyTorch weights"):
        load_checkpoint(folder)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(InputError, match="a pickle, which needs PyTorch"):
            load_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_checkpoint(folder)
    for text in ("{", "[]", "[" * 100_000, '{"a":' * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(InputError, match="not JSON"):
            load_checkpoint(folder)
    with pytest.raises(InputError, match="is missing"):
        load_checkpoint(tmp_path)


def test_names(tiny_en_folder, monkeypatch):
    assert load_checkpoint("whisper-tiny.en").source == tiny_en_folder
    with pytest.raises(InputError, match="flax-distil fetch"):
        load_checkpoint("whisper-enormous")

    def offline(name, **_):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError(f"Got: ConnectError for {name}\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"'someone/whisper'.*cannot be downloaded.*ConnectError"):
        load_checkpoint("someone/whisper")


def test_a_hub_name_is_downloaded_once_and_without_pickles(teacher, random_folders, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked, revisions = [], []

    def download(name, allow_patterns, revision):
        assert name == "someone/whisper"
        asked.extend(allow_patterns)
        revisions.append(revision)
        return random_folders[0]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(load_checkpoint("someone/whisper"), teacher)
    wanted = ["config.json", "merges.txt", "model.safetensors", "model-00001-of-00002.safetensors"]
    # as in openai/whisper-large-v3
    others = ["model.fp32-00001-of-00002.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=asked)) == wanted
    load_checkpoint("someone/whisper@refs/pr/1")
    assert revisions == [None, "refs/pr/1"]


def test_a_full_disk_leaves_the_old_model(teacher, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_checkpoint(teacher, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(InputError, match=f"{folder} could not be written.*No space left"):
        save_checkpoint(teacher, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(teacher, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_saving_over_a_model_keeps_other_files(teacher, random_folders, tmp_path):
    folder = tmp_path / "model"
    save_checkpoint(teacher, folder)
    (folder / "README.md").write_text("mine")
    (folder / "model.safetensors.index.json").write_text("{}")
    save_checkpoint(load_checkpoint(random_folders[1]), folder)
    assert load_checkpoint(folder).dims.decoder_layers == 1
    assert (folder / "README.md").read_text() == "mine"
    assert not (folder / "model.safetensors.index.json").exists()


def test_a_model_without_tokenizer_is_saved_with_a_warning(teacher, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    bare = module.Checkpoint(
        teacher.dims, teacher.params, teacher.config, teacher.generation, tmp_path / "empty"
    )
    with caplog.at_level(logging.WARNING):
        save_checkpoint(bare, tmp_path / "model")
    assert "51864 tokens" in caplog.text
    extractor = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert extractor["feature_size"] == 80


def test_a_foreign_tokenizer_is_refused(tiny_en_folder, base_folder, tmp_path):
    with pytest.raises(InputError, match="another model"):
        write_tokenizer(
            tiny_en_folder / "tokenizer.json", tmp_path, load_checkpoint(base_folder).dims
        )
