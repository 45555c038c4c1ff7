"""Weights as others keep them: prefixes, PyTorch's pickle, odd types and names of shards."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
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


def flax_tree(folder, scanned):
    """The tensors as FlaxWhisperForConditionalGeneration of Transformers 4 names them."""
    tree = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        *path, kind = name.split(".")
        if kind == "weight" and tensor.ndim > 1 and "embed_" not in name:
            kind, tensor = "kernel", tensor.T
        elif kind == "weight":
            kind = "embedding" if "embed_" in name else "scale"
        tree[*path, kind] = tensor
    if scanned:  # as distil-whisper's models, where the layers are one array
        for half in ("Encoder", "Decoder"):
            for path in [path for path in tree if path[1:4] == (half.lower(), "layers", "0")]:
                names = [(*path[:3], str(layer), *path[4:]) for layer in range(9)]
                stacked = np.stack([tree.pop(name) for name in names if name in tree])
                tree[*path[:3], f"Flax{half}ScanLayers", *path[4:]] = stacked
    return unflatten_dict(tree)


@pytest.mark.parametrize("kind", ["plain", "scanned", "shards", "bfloat16", "bare"])
def test_flax_checkpoints(teacher, folder, kind):
    tree = flax_tree(folder, scanned=kind == "scanned")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(old_config(folder)))
    files = {"flax_model.msgpack": tree["model"] if kind == "bare" else tree}
    if kind == "shards":
        files = {
            f"flax_model-0000{number}-of-00002.msgpack": {"model": {half: tree["model"][half]}}
            for number, half in ((1, "encoder"), (2, "decoder"))
        }
    if kind == "bfloat16":
        files = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), files)
    for name, content in files.items():
        (folder / name).write_bytes(msgpack_serialize(jax.tree.map(np.asarray, content)))
    loaded, wanted = load_checkpoint(folder), teacher.params
    if kind == "bfloat16":
        wanted = jax.tree.map(lambda array: np.asarray(jnp.bfloat16(array), np.float32), wanted)
    assert same_arrays(loaded.params, wanted)
    save_checkpoint(loaded, folder)
    assert not list(folder.glob("*.msgpack"))


def old_config(folder):
    """Without the keys that a Whisper configuration of those years may lack."""
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("num_mel_bins", "dtype")}


def test_damaged_flax_checkpoints(folder):
    (folder / "model.safetensors").unlink()
    for content in (b"", b"\x81", msgpack_serialize({"a": 1}), b"\xc1" * 100):
        (folder / "flax_model.msgpack").write_bytes(content)
        with pytest.raises(InputError, match=r"not a Flax checkpoint|not a Whisper's"):
            load_checkpoint(folder)


@pytest.mark.parametrize("trainer", ["Trainer", "Accelerate"])
def test_checkpoints_of_trainers(teacher, random_folders, tmp_path, trainer):
    """Transformers' Trainer keeps no tokenizer, Accelerate neither it nor a configuration."""
    for kept, name in (("config.json", "run"), ("tokenizer.json", "run")):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(random_folders[0] / kept, tmp_path / name)
    own = tmp_path / "run" / "checkpoint-10"
    own.mkdir()
    shutil.copy(random_folders[0] / "model.safetensors", own)
    for other in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (own / other).touch()
    if trainer == "Trainer":
        (tmp_path / "run" / "config.json").rename(own / "config.json")
    loaded = load_checkpoint(own)
    assert same_arrays(loaded.params, teacher.params)
    assert loaded.tokens().eot == teacher.tokens().eot
    if trainer == "Trainer":
        with pytest.raises(InputError, match="has no model and checkpoint-10: name one of them"):
            load_checkpoint(own.parent)


def test_heads_that_a_configuration_leaves_out_are_transformers_default(teacher, folder):
    """6, which this model's width does not divide by: the error names both."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("encoder_attention_heads", "num_mel_bins", "d_model", "max_target_positions"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="width 16 does not divide over 6 encoder heads"):
        load_checkpoint(folder)
