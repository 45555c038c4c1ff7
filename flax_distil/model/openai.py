"""OpenAI's `.pt` files, to and from Transformers' tensor names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_distil.errors import InputError
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.generation import generation_config, special_ids, token_ids
from flax_distil.model.tensors import Stored, load_torch, stored_torch
from flax_distil.model.weights import dims_of

DIMS = {
    "mels": "n_mels",
    "vocab": "n_vocab",
    "width": "n_audio_state",
    "encoder_layers": "n_audio_layer",
    "encoder_heads": "n_audio_head",
    "decoder_layers": "n_text_layer",
    "decoder_heads": "n_text_head",
    "audio_positions": "n_audio_ctx",
    "text_positions": "n_text_ctx",
}

# OpenAI's name of a module -> Transformers'; a block's modules stand under blocks.N / layers.N.
TOP = {
    "encoder.conv1": "model.encoder.conv1",
    "encoder.conv2": "model.encoder.conv2",
    "encoder.ln_post": "model.encoder.layer_norm",
    "decoder.ln": "model.decoder.layer_norm",
}
BLOCK = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
CROSS = {
    "cross_attn.query": "encoder_attn.q_proj",
    "cross_attn.key": "encoder_attn.k_proj",
    "cross_attn.value": "encoder_attn.v_proj",
    "cross_attn.out": "encoder_attn.out_proj",
    "cross_attn_ln": "encoder_attn_layer_norm",
}
BARE = {
    "encoder.positional_embedding": "model.encoder.embed_positions.weight",
    "decoder.positional_embedding": "model.decoder.embed_positions.weight",
    "decoder.token_embedding.weight": "model.decoder.embed_tokens.weight",
}


def read_openai(
    path: str | Path,
) -> tuple[dict[str, Any], dict[str, Stored], dict[str, Any]]:
    """The Whisper in an OpenAI `.pt` as (config, tensors, generation config) of Transformers.

    Tensors are under Transformers' names, float32 when read; a name that is not in the table keeps
    its own, for `from_hf` to report. The file is loaded with `weights_only`: it cannot run code.

    Raises:
        InputError: torch is missing, or the file is not an OpenAI Whisper's.
    """
    path = Path(path)
    saved = load_torch(path, "an OpenAI checkpoint")
    if not isinstance(saved, dict) or not {"dims", "model_state_dict"} <= saved.keys():
        raise InputError(f"{path} lacks 'dims' or 'model_state_dict': it is not an OpenAI Whisper")
    found = saved["dims"] if isinstance(saved["dims"], dict) else {}
    keys = (*DIMS.values(), "n_text_state")
    if wrong := [key for key in keys if type(found.get(key)) is not int]:
        raise InputError(f"{path}: 'dims' lacks {', '.join(wrong)}, or they are not whole numbers")
    sizes = {field: found[key] for field, key in DIMS.items()}
    if sizes["width"] != found["n_text_state"]:
        raise InputError(
            f"{path}: the encoder is {sizes['width']} wide, the decoder {found['n_text_state']}; "
            "Whisper's are equal"
        )
    stored = stored_torch(path, saved["model_state_dict"])
    blocks = max(sizes["encoder_layers"], sizes["decoder_layers"])
    if blocks > len(stored):  # before a table of so many names is made
        raise InputError(f"{path}: 'dims' has {blocks:,} layers, the file {len(stored):,} tensors")
    dims = WhisperDims(**sizes, encoder_ffn=4 * sizes["width"], decoder_ffn=4 * sizes["width"])
    names, config = openai_names(dims), dims_to_hf(dims)
    tensors = {names.get(name, name): tensor for name, tensor in stored.items()}
    dims = dims_of(config, {name: tensor.shape for name, tensor in tensors.items()})
    ids = special_ids(dims, path.parent)
    return config | token_ids(dims, ids), tensors, generation_config(dims, ids=ids)


def to_openai(
    dims: WhisperDims, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """OpenAI's (dims, state dict) of tensors under Transformers' names; `.pt` holds these two.

    Raises:
        InputError: the feed-forward layers are not four widths wide, which the format takes for
            granted.
    """
    if {dims.encoder_ffn, dims.decoder_ffn} != {4 * dims.width}:
        raise InputError(
            f"feed-forward sizes {dims.encoder_ffn} and {dims.decoder_ffn}: OpenAI's format needs "
            f"4 x width = {4 * dims.width}"
        )
    sizes = {key: getattr(dims, field) for field, key in DIMS.items()}
    state = {theirs: tensors[ours] for theirs, ours in openai_names(dims).items()}
    return sizes | {"n_text_state": dims.width}, state


def openai_names(dims: WhisperDims) -> dict[str, str]:
    """Every tensor: OpenAI's name -> Transformers'."""
    modules = dict(TOP)
    for side, layers in (("encoder", dims.encoder_layers), ("decoder", dims.decoder_layers)):
        block = BLOCK | (CROSS if side == "decoder" else {})
        modules |= {
            f"{side}.blocks.{layer}.{theirs}": f"model.{side}.layers.{layer}.{ours}"
            for layer in range(layers)
            for theirs, ours in block.items()
        }
    return BARE | {
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in modules.items()
        for leaf in ("weight", "bias")
        if not (theirs.endswith("attn.key") and leaf == "bias")  # Whisper's keys have none
    }
