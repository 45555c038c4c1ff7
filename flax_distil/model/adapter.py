"""LoRA adapters of PEFT: low-rank updates of a base model, W + s B A (Hu et al. 2021)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_distil.errors import InputError, read_json
from flax_distil.model.tensors import Stored, open_safetensors, whisper_names

ADAPTER = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Settings that change what an adapter computes; other values are not supported.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
EMPTY = ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")


def read_adapter(folder: Path) -> tuple[str, float, dict[str, Stored]]:
    """The base model's name, the scale s, and the matrices A [r in] and B [out r] by their names.

    Raises:
        InputError: it is not a plain LoRA adapter.
    """
    config = read_json(folder / ADAPTER)
    unsupported = [
        key for key, value in PLAIN.items() if config.get(key, value) not in (value, None)
    ]
    unsupported += [key for key in EMPTY if config.get(key)]
    if unsupported:
        raise InputError(
            f"{folder} is an adapter with {unsupported[0]} "
            f"{str(config[unsupported[0]])[:40]!r}, and only plain LoRA is supported: "
            "merge_and_unload() it in PEFT and save the model"
        )
    keys = ("base_model_name_or_path", "r", "lora_alpha")
    base, rank, alpha = (config.get(key, 0) for key in keys)
    numbers = isinstance(alpha, int | float) and isinstance(rank, int) and rank > 0
    if not numbers or not isinstance(base, str):
        raise InputError(
            f"{folder / ADAPTER} needs base_model_name_or_path, r and lora_alpha: it has "
            f"{str(base)[:80]!r}, {str(rank)[:20]} and {str(alpha)[:20]}"
        )
    if not (folder / TENSORS).is_file():
        raise InputError(f"{folder} is a LoRA adapter of {base} and has no {TENSORS}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return base, scale, whisper_names(open_safetensors(folder / TENSORS))


def merge_adapter(
    tensors: Mapping[str, Any], matrices: Mapping[str, Stored], scale: float
) -> dict[str, Any]:
    """The base model's tensors with the adapter's changes added.

    Raises:
        InputError: a matrix is not LoRA's, lacks its pair, or does not fit the base model.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, matrix in matrices.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not found:
            raise InputError(f"the adapter has {name}, which is not a LoRA matrix")
        pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = np.asarray(matrix, np.float32)
    whole = dict(tensors)
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise InputError(f"the adapter has only lora_{min(pair)} for {name}: save it again")
        base = np.asarray(whole.get(name, ()), np.float32)
        if base.shape != (len(pair["B"]), pair["A"].shape[-1]):
            raise InputError(
                f"the adapter changes {name} by {pair['B'].shape} x {pair['A'].shape} and the base "
                f"model has {base.shape}: it belongs to another model"
            )
        whole[name] = base + np.float32(scale) * (pair["B"] @ pair["A"])
    return whole
