"""LoRA by hand: W + alpha / r B A."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.model.weights import to_hf

NAME = "model.decoder.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."


@pytest.fixture
def adapter(random_folders, tmp_path):
    """Writes an adapter of rank 2 and alpha 3 for one matrix; returns its folder."""

    def make(settings=None, tensors=None, width=16):
        config = {"peft_type": "LORA", "base_model_name_or_path": str(random_folders[0])}
        config |= {"r": 2, "lora_alpha": 3, "bias": "none", "modules_to_save": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | (settings or {})))
        if tensors is None:
            down, up = np.zeros((2, width), np.float32), np.zeros((16, 2), np.float32)
            down[0, 5], down[1, 0], up[7, 0], up[9, 1] = 10.0, 4.0, 0.5, 1.0
            tensors = {"lora_A.weight": down, "lora_B.weight": up}
        named = {f"{PREFIX}{NAME}.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.5), ({"use_rslora": True}, 3 / 2**0.5)])
def test_an_adapter_is_merged(random_folders, adapter, settings, scale):
    base, found = load_checkpoint(random_folders[0]), load_checkpoint(adapter(settings))
    before, after = (to_hf(one.dims, one.params) for one in (base, found))
    change = after.pop(f"{NAME}.weight") - before.pop(f"{NAME}.weight")
    wanted = np.zeros((16, 16))
    wanted[7, 5], wanted[9, 0] = 5.0 * scale, 4.0 * scale  # [out, in]
    np.testing.assert_allclose(change, wanted, atol=1e-6)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert found.generation == base.generation
    assert found.source == random_folders[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'.*merge_and_unload"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 0}, "needs base_model_name_or_path, r and lora_alpha"),
        ({"lora_alpha": "3"}, "needs base_model"),
        ({"base_model_name_or_path": None}, "needs base_model"),
        (
            {"base_model_name_or_path": "whisper-none"},
            "LoRA adapter of whisper-none: 'whisper-none'",
        ),
    ],
)
def test_other_adapters_are_named(adapter, settings, words):
    with pytest.raises(InputError, match=words):
        load_checkpoint(adapter(settings))


def test_an_adapter_of_an_adapter(adapter, tmp_path):
    with pytest.raises(InputError, match="an adapter too"):
        load_checkpoint(adapter({"base_model_name_or_path": str(tmp_path)}))


def test_matrices_that_do_not_fit(adapter):
    with pytest.raises(InputError, match=rf"{NAME}\.weight by \(16, 2\) x \(2, 8\).*\(16, 16\)"):
        load_checkpoint(adapter(width=8))
    with pytest.raises(InputError, match="only lora_A for"):
        load_checkpoint(adapter(tensors={"lora_A.weight": np.zeros((2, 16), np.float32)}))
    with pytest.raises(InputError, match="not a LoRA matrix"):
        load_checkpoint(adapter(tensors={"magnitude": np.zeros(16, np.float32)}))
