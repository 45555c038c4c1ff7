"""LoRA adapters of PEFT: small matrices beside a base model's, W + s B A (Hu et al. 2021)."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_distil.errors import InputError, read_json
from flax_distil.model.tensors import Stored, open_safetensors, whisper_names

ADAPTER = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Settings that change what an adapter computes: another value than these is refused.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False}
EMPTY = ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")


@dataclass(frozen=True, eq=False)
class Adapter:
    """The base model's name, and by its tensors' names the matrices A [r in] and B [out r]."""

    base: str
    scale: float
    down: Mapping[str, Stored]
    up: Mapping[str, Stored]


def read_adapter(folder: Path) -> Adapter:
    """A plain LoRA adapter of linear layers.

    Raises:
        InputError: it is another kind, or its matrices do not pair.
    """
    config = read_json(folder / ADAPTER)
    odd = [key for key, value in PLAIN.items() if config.get(key, value) not in (value, None)]
    odd += [key for key in EMPTY if config.get(key)]
    if odd:
        raise InputError(
            f"{folder} is an adapter with {odd[0]} {str(config[odd[0]])[:40]!r}, and only plain "
            "LoRA is merged here: merge_and_unload() it in PEFT and save the whole model"
        )
    keys = ("base_model_name_or_path", "r", "lora_alpha")
    values: list[Any] = [config.get(key) for key in keys]
    base, rank, alpha = values
    numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float)
    if not isinstance(base, str) or not numbers or not math.isfinite(alpha):
        raise InputError(
            f"{folder / ADAPTER} needs base_model_name_or_path, r and lora_alpha: it has "
            f"{str(base)[:80]!r}, {str(rank)[:20]} and {str(alpha)[:20]}"
        )
    if not (folder / TENSORS).is_file():
        raise InputError(f"{folder} is a LoRA adapter of {base} and has no {TENSORS}")
    parts: dict[str, dict[str, Stored]] = {"A": {}, "B": {}}
    for name, tensor in whisper_names(open_safetensors(folder / TENSORS)).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not found:
            raise InputError(f"{folder / TENSORS} has {name}, which is not a LoRA matrix")
        parts[found[2]][f"{found[1]}.weight"] = tensor
    if parts["A"].keys() != parts["B"].keys() or not parts["A"]:
        raise InputError(f"{folder / TENSORS} has not one lora_A to each lora_B: save it again")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(base, scale, parts["A"], parts["B"])


def merged(tensors: Mapping[str, np.ndarray], adapter: Adapter) -> dict[str, np.ndarray]:
    """The base model's tensors with the adapter's changes added.

    Raises:
        InputError: the base has no such tensor, or one of another shape.
    """
    whole = dict(tensors)
    for name, down in adapter.down.items():
        up = adapter.up[name]
        wanted = whole[name].shape if name in whole else None
        if len(up.shape) != 2 or len(down.shape) != 2 or wanted != (up.shape[0], down.shape[1]):
            raise InputError(
                f"the adapter changes {name} by {up.shape} x {down.shape} and {adapter.base} has "
                f"{wanted or 'no such tensor'}: it belongs to another model"
            )
        change = np.asarray(up, np.float32) @ np.asarray(down, np.float32)
        whole[name] = whole[name] + np.float32(adapter.scale) * change
    return whole
