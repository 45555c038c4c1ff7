"""Parameter names: one table between our tree and the published Transformers checkpoints.

Other formats (OpenAI, CTranslate2) are translated to Transformers names first, so this table and
its three layouts are all there is to know: a dense kernel is [in, out] here and [out, in] there, a
convolution kernel [time, in, out] here and [out, in, time] there, all else is as it is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_distil.errors import InputError
from flax_distil.model.dims import WhisperDims, dims_from_hf
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


def from_hf(dims: WhisperDims, tensors: Mapping[str, Any]) -> Params:
    """Our parameters (float32 numpy, unstacked) from tensors under Transformers names.

    A tensor is an array, or a `Stored` one, which is read once all names and shapes are right. The
    projection `proj_out.weight` is left out where it equals the token embedding, and a bias of the
    keys, which Whisper has not, where it is zero.

    Raises:
        InputError: naming the missing, unknown and mis-shaped tensors together, or an untied
            projection.
    """
    tensors = _without_extras(tensors)
    table, shapes = names(dims), _shapes(dims)
    wanted = {name: _swapped(path, shapes[path]) for path, name in table.items()}
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if faults:
        raise InputError(f"the weights do not fit {dims}: {few(faults)}")
    params: Params = {}
    for path, name in table.items():
        leaf = np.asarray(tensors[name], np.float32)
        _put(params, path, np.ascontiguousarray(_swap(path, leaf)))
    return params


def dims_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> WhisperDims:
    """The sizes that tensors under Transformers names have; heads are those of the config.

    Raises:
        InputError: the tensors are not a Whisper's, or `config.json` says other sizes.
    """

    def size(name: str, axis: int, rank: int) -> int:
        shape = shapes.get(f"model.{name}", ())
        if len(shape) != rank:
            raise InputError(
                f"the weights are not a Whisper's: they lack model.{name} of {rank} dimensions and "
                f"hold {few(sorted(shapes), 3) or 'nothing'}"
            )
        return shape[axis]

    def layers(half: str) -> int:
        found = (re.match(rf"model\.{half}\.layers\.(\d+)\.", name) for name in shapes)
        return len({layer[1] for layer in found if layer})

    sizes = {
        "mels": size("encoder.conv1.weight", 1, 3),
        "vocab": size("decoder.embed_tokens.weight", 0, 2),
        "width": size("decoder.embed_tokens.weight", 1, 2),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_ffn": size("encoder.layers.0.fc1.weight", 0, 2),
        "decoder_ffn": size("decoder.layers.0.fc1.weight", 0, 2),
        "audio_positions": size("encoder.embed_positions.weight", 0, 2),
        "text_positions": size("decoder.embed_positions.weight", 0, 2),
    }
    return dims_from_hf(config, sizes)


def few(parts: Sequence[str], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    more = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {more} more" if more > 0 else "")


def to_hf(dims: WhisperDims, params: Params) -> dict[str, np.ndarray]:
    """Tensors under Transformers names, the inverse of `from_hf`."""
    return {
        name: np.ascontiguousarray(_swap(path, np.asarray(_get(params, path))))
        for path, name in names(dims).items()
    }


def _swap(path: Path, leaf: np.ndarray) -> np.ndarray:
    """Reverses the axes of kernels: [in, out] ↔ [out, in], [time, in, out] ↔ [out, in, time]."""
    return leaf.T if path[-1] == "kernel" else leaf


def _swapped(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`_swap` of a shape."""
    return shape[::-1] if path[-1] == "kernel" else shape


def _without_extras(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without a projection equal to the embedding, and without zero biases of keys."""
    kept = dict(tensors)
    if (head := kept.pop("proj_out.weight", None)) is not None:
        embedding = kept.get("model.decoder.embed_tokens.weight", head)
        if not np.array_equal(np.asarray(head), np.asarray(embedding)):
            raise InputError(
                "proj_out.weight differs from the token embedding: Whisper's projection is tied to "
                "it, and this one would be lost; tie them (tie_word_embeddings) and train again"
            )
    for name in [name for name in kept if name.endswith("k_proj.bias")]:
        if not np.any(np.asarray(kept[name])):
            del kept[name]
    return kept


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
