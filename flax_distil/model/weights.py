"""Parameter names: one table between our tree and the published Transformers checkpoints.

Other formats (OpenAI, CTranslate2) are translated to Transformers names first, so this table and
its three layouts are all there is to know: a dense kernel is [in, out] here and [out, in] there, a
convolution kernel [time, in, out] here and [out, in, time] there, all else is as it is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flax_distil.errors import InputError
from flax_distil.model.dims import WhisperDims
from flax_distil.model.spec import Params, Spec

Path = tuple[str | int, ...]

_LINEAR = {"kernel": "weight", "bias": "bias"}
_NORM = {"scale": "weight", "bias": "bias"}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _layer(cross: bool) -> Iterator[tuple[Path, str]]:
    attentions = {"self_attention": "self_attn"} | (
        {"cross_attention": "encoder_attn"} if cross else {}
    )
    for ours, theirs in attentions.items():
        for ours_projection, their_projection in _ATTENTION.items():
            for leaf, their_leaf in _LINEAR.items():
                if (ours_projection, leaf) != ("key", "bias"):
                    yield (ours, ours_projection, leaf), f"{theirs}.{their_projection}.{their_leaf}"
    norms = {"self_norm": "self_attn_layer_norm", "feed_norm": "final_layer_norm"}
    norms |= {"cross_norm": "encoder_attn_layer_norm"} if cross else {}
    for ours, theirs in norms.items():
        for leaf, their_leaf in _NORM.items():
            yield (ours, leaf), f"{theirs}.{their_leaf}"
    for ours, theirs in {"up": "fc1", "down": "fc2"}.items():
        for leaf, their_leaf in _LINEAR.items():
            yield ("feed_forward", ours, leaf), f"{theirs}.{their_leaf}"


def names(dims: WhisperDims) -> dict[Path, str]:
    """Every parameter: path in our tree → Transformers name."""
    table: dict[Path, str] = {
        ("encoder", "positions"): "model.encoder.embed_positions.weight",
        ("decoder", "positions", "embedding"): "model.decoder.embed_positions.weight",
        ("decoder", "tokens", "embedding"): "model.decoder.embed_tokens.weight",
    }
    for conv in ("conv1", "conv2"):
        for leaf, their_leaf in _LINEAR.items():
            table["encoder", conv, leaf] = f"model.encoder.{conv}.{their_leaf}"
    layers = {"encoder": dims.encoder_layers, "decoder": dims.decoder_layers}
    for half, count in layers.items():
        for leaf, their_leaf in _NORM.items():
            table[half, "norm", leaf] = f"model.{half}.layer_norm.{their_leaf}"
        for index in range(count):
            for path, name in _layer(cross=half == "decoder"):
                table[half, "layers", index, *path] = f"model.{half}.layers.{index}.{name}"
    return table


def from_hf(dims: WhisperDims, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameters (float32 numpy, unstacked) from tensors under Transformers names.

    The tied projection `proj_out.weight` is accepted and left out.

    Raises:
        InputError: naming all missing, unknown and mis-shaped tensors together.
    """
    table, shapes = names(dims), _shapes(dims)
    found = {name: tensor for name, tensor in tensors.items() if name != "proj_out.weight"}
    faults = [f"missing {name}" for name in table.values() if name not in found]
    faults += [f"unknown {name}" for name in found if name not in set(table.values())]
    params: Params = {}
    for path, name in table.items():
        if name not in found:
            continue
        leaf = np.ascontiguousarray(_swap(path, np.asarray(found[name], np.float32)))
        if leaf.shape != shapes[path]:
            wanted = _swap(path, np.empty(shapes[path], bool)).shape
            faults.append(f"{name} has shape {np.shape(found[name])}, not {wanted}")
        _put(params, path, leaf)
    if faults:
        raise InputError(f"the weights do not fit {dims}: {'; '.join(faults)}")
    return params


def to_hf(dims: WhisperDims, params: Params) -> dict[str, np.ndarray]:
    """Tensors under Transformers names, the inverse of `from_hf`."""
    return {
        name: np.ascontiguousarray(_swap(path, np.asarray(_get(params, path))))
        for path, name in names(dims).items()
    }


def _swap(path: Path, leaf: np.ndarray) -> np.ndarray:
    """Reverses the axes of kernels: [in, out] ↔ [out, in], [time, in, out] ↔ [out, in, time]."""
    return leaf.T if path[-1] == "kernel" else leaf


def _shapes(dims: WhisperDims) -> dict[Path, tuple[int, ...]]:
    abstract = Spec(dims).abstract()
    return {path: _get(abstract, path).shape for path in names(dims)}


def _get(tree: Params, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: Path, leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
