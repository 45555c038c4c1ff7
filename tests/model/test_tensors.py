"""Weights as others keep them: prefixes, PyTorch's pickle, odd types and names of shards."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint, save_checkpoint
from flax_distil.model.student import same_arrays

EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.fixture
def teacher(random_folders):
    return load_checkpoint(random_folders[0])


@pytest.fixture
def folder(teacher, tmp_path):
    save_checkpoint(teacher, tmp_path / "model")
    return tmp_path / "model"


def change(folder, by):
    """Rewrite the weights: `by` takes and returns name → tensor."""
    path = folder / "model.safetensors"
    save_file(by(load_file(path)), path)


@pytest.mark.parametrize("prefix", ["_orig_mod.model.", "module.model.", "", "base_model.model."])
def test_prefixes_of_wrappers_are_understood(teacher, folder, prefix):
    change(folder, lambda old: {prefix + n.removeprefix("model."): x for n, x in old.items()})
    assert same_arrays(load_checkpoint(folder).params, teacher.params)


def test_a_compiled_half_is_understood_and_a_tensor_twice_is_not(teacher, folder):
    change(
        folder,
        lambda old: {
            n.replace("encoder.layers", "_orig_mod.encoder.layers"): x for n, x in old.items()
        },
    )
    assert same_arrays(load_checkpoint(folder).params, teacher.params)
    change(folder, lambda old: old | {"module." + EMBEDDING: old[EMBEDDING]})
    with pytest.raises(InputError, match=f"hold {EMBEDDING} twice"):
        load_checkpoint(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin(teacher, folder, sharded):
    path = folder / "model.safetensors"
    state = {name: torch.from_numpy(x) for name, x in load_file(path).items()}
    path.unlink()
    names = sorted(state)
    parts = {"pytorch_model.bin": names}
    if sharded:
        parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in (0, 1)}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, folder / file)
    assert same_arrays(load_checkpoint(folder).params, teacher.params)


class Harmful:
    def __reduce__(self):
        return print, ("harm done",)


def test_code_in_a_pickle_is_not_run(folder, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({EMBEDDING: Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as PyTorch weights"):
        load_checkpoint(folder)
    assert "harm done" not in capsys.readouterr().out
    torch.save({EMBEDDING: "text"}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="not a state dict"):
        load_checkpoint(folder)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "I32"])
def test_other_types_are_named(folder, kind):
    """One tensor's bytes, called numbers of another type."""
    path, name = folder / "model.safetensors", "model.decoder.layer_norm.bias"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    shape = header[name]["shape"] if kind == "I32" else [4 * header[name]["shape"][0]]
    header[name] |= {"dtype": kind, "shape": shape}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(InputError, match=rf"{name} is of type {kind}, not float32, float16"):
        load_checkpoint(folder)


def test_a_pointer_of_git_lfs_is_called_so(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        load_checkpoint(folder)


def test_an_untied_projection_is_refused_and_a_tied_one_accepted(teacher, folder):
    change(folder, lambda old: old | {"proj_out.weight": old[EMBEDDING].copy()})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert same_arrays(load_checkpoint(folder).params, teacher.params)
    change(folder, lambda old: old | {"proj_out.weight": old[EMBEDDING] * 1.5})
    with pytest.raises(InputError, match="differs from the token embedding"):
        load_checkpoint(folder)
    change(folder, lambda old: {n: x for n, x in old.items() if n != "proj_out.weight"})
    with pytest.raises(InputError, match=r"proj_out\.weight is missing"):
        load_checkpoint(folder)


def test_biases_of_keys_are_zero_or_refused(teacher, folder):
    name, width = "model.encoder.layers.0.self_attn.k_proj.bias", teacher.dims.width
    change(folder, lambda old: old | {name: np.zeros(width, np.float32)})
    assert same_arrays(load_checkpoint(folder).params, teacher.params)
    change(folder, lambda old: old | {name: np.ones(width, np.float32)})
    with pytest.raises(InputError, match=f"unknown {name}"):
        load_checkpoint(folder)


def test_other_weights_are_called_so_in_one_short_line(folder):
    bert = {f"bert.encoder.layer.{n}.output.dense.weight": np.zeros(2) for n in range(300)}
    change(folder, lambda old: bert)
    with pytest.raises(InputError, match="not a Whisper's") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 400


def test_many_faults_are_shortened(folder):
    change(folder, lambda old: {n: x for n, x in old.items() if "_attn" not in n})
    with pytest.raises(InputError, match=r"and \d\d more") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 1200
