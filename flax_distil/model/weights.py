"""Parameter names: one table between our tree and the published formats, used in both directions.

All formats are translated to Transformers' names first. A dense kernel is [in, out] here and
[out, in] there, a convolution kernel [time, in, out] here and [out, in, time] there; all other
parameters have the same layout.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_distil.errors import InputError
from flax_distil.model.dims import SIZES, WhisperDims, check_architecture, dims_from_hf
from flax_distil.model.spec import HALVES, Params, Spec

# Columns: ours, Transformers', OpenAI's, CTranslate2's. First whole parameters, then modules.
EMBEDDINGS = """
encoder.positions           encoder.embed_positions.weight encoder.positional_embedding   encoder/position_encodings/encodings
decoder.positions.embedding decoder.embed_positions.weight decoder.positional_embedding   decoder/position_encodings/encodings
decoder.tokens.embedding    decoder.embed_tokens.weight    decoder.token_embedding.weight decoder/embeddings/weight
"""  # noqa: E501
TOP = """
encoder.conv1 encoder.conv1      encoder.conv1   encoder/conv1
encoder.conv2 encoder.conv2      encoder.conv2   encoder/conv2
encoder.norm  encoder.layer_norm encoder.ln_post encoder/layer_norm
decoder.norm  decoder.layer_norm decoder.ln      decoder/layer_norm
"""
# Modules of a layer. CTranslate2 stacks the rows of modules that have one name there.
LAYER = """
self_attention.query self_attn.q_proj     attn.query self_attention/linear_0
self_attention.key   self_attn.k_proj     attn.key   self_attention/linear_0
self_attention.value self_attn.v_proj     attn.value self_attention/linear_0
self_attention.out   self_attn.out_proj   attn.out   self_attention/linear_1
self_norm            self_attn_layer_norm attn_ln    self_attention/layer_norm
feed_forward.up      fc1                  mlp.0      ffn/linear_0
feed_forward.down    fc2                  mlp.2      ffn/linear_1
feed_norm            final_layer_norm     mlp_ln     ffn/layer_norm
"""
CROSS_ATTENTION = """
cross_attention.query encoder_attn.q_proj     cross_attn.query attention/linear_0
cross_attention.key   encoder_attn.k_proj     cross_attn.key   attention/linear_1
cross_attention.value encoder_attn.v_proj     cross_attn.value attention/linear_1
cross_attention.out   encoder_attn.out_proj   cross_attn.out   attention/linear_2
cross_norm            encoder_attn_layer_norm cross_attn_ln    attention/layer_norm
"""
NORM = ((".scale", ".weight", ".weight", "/gamma"), (".bias", ".bias", ".bias", "/beta"))
LINEAR = ((".kernel", ".weight", ".weight", "/weight"), (".bias", ".bias", ".bias", "/bias"))

FLOAT = re.compile(r"(torch\.)?(b?float|B?F)(16|32|64)")  # of numpy, PyTorch and safetensors

Path = tuple[str | int, ...]


class Name(NamedTuple):
    """The names of one parameter; `ours` is the path in our tree."""

    ours: Path
    hf: str
    openai: str
    ctranslate2: str


def names(encoder_layers: int, decoder_layers: int, key_bias: bool = False) -> list[Name]:
    """Every parameter of a Whisper. key_bias: with the biases of keys, which Whisper lacks."""
    modules, rows = _rows(TOP), _rows(EMBEDDINGS)
    for half, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        layer = _rows(LAYER) + (_rows(CROSS_ATTENTION) if half == "decoder" else [])
        for n in range(layers):
            ours, theirs = f"{half}.layers.{n}.", (f"{half}.blocks.{n}.", f"{half}/layer_{n}/")
            modules += [_joined((ours, ours, *theirs), module) for module in layer]
    for module in modules:
        weight, bias = NORM if module[0].endswith("norm") else LINEAR
        rows.append(_joined(module, weight))
        if key_bias or not module[0].endswith("key"):
            rows.append(_joined(module, bias))
    return [
        Name(
            tuple(int(key) if key.isdigit() else key for key in ours.split(".")),
            f"model.{hf}",
            *more,
        )
        for ours, hf, *more in rows
    ]


def _rows(table: str) -> list[tuple[str, ...]]:
    return [tuple(line.split()) for line in table.strip().splitlines()]


def _joined(left: Sequence[str], right: Sequence[str]) -> tuple[str, ...]:
    return tuple(map("".join, zip(left, right, strict=True)))


def names_in(tensors: Iterable[str], key_bias: bool = False) -> list[Name]:
    """`names` for as many layers as OpenAI's or CTranslate2's names have."""
    layers = len(set(re.findall(r"/layer_(\d+)/|\.blocks\.(\d+)\.", "\n".join(tensors))))
    return names(layers, layers, key_bias)


def from_hf(dims: WhisperDims, tensors: Mapping[str, Any]) -> Params:
    """Our parameters (float32 numpy, unstacked) from tensors under Transformers' names.

    A tensor is an array or a `Stored` one, which is read once all names, shapes and types are
    right. `proj_out.weight` is left out where it equals the token embedding, and a bias of keys,
    which Whisper lacks, where it is zero.

    Raises:
        InputError: naming the missing, unknown and mis-shaped tensors together, or an untied
            projection.
    """
    tensors = _without_extras(tensors)
    table = _paths(dims)
    flat: dict[Path, Any] = flatten_dict(Spec(dims).abstract())
    wanted = {
        table[path]: leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        for path, leaf in flat.items()
    }
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            faults.append(f"unknown {name}")
        elif not FLOAT.fullmatch(str(tensor.dtype)):
            faults.append(f"{name} is of type {tensor.dtype}, not float32, float16 or bfloat16")
        elif tuple(tensor.shape) != wanted[name]:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, not {wanted[name]}")
    if faults:
        raise InputError(f"the weights do not fit {dims}: {few(faults)}")
    for path, name in table.items():
        tensor = np.asarray(tensors[name], np.float32)
        flat[path] = np.ascontiguousarray(_transposed(path, tensor))
    return unflatten_dict(flat)


def to_hf(dims: WhisperDims, params: Params) -> dict[str, np.ndarray]:
    """Tensors under Transformers' names, the inverse of `from_hf`."""
    flat: dict[Path, Any] = flatten_dict(params)
    return {
        name: np.ascontiguousarray(_transposed(path, np.asarray(flat[path])))
        for path, name in _paths(dims).items()
    }


def dims_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> WhisperDims:
    """The sizes that tensors under Transformers' names have; heads are those of the config.

    Raises:
        InputError: the tensors are not a Whisper's, or the configuration has other sizes.
    """
    check_architecture(config)
    sizes = {}
    for size, *_, name, axis in (row for row in SIZES if row[-1] != "-"):
        shape = shapes.get(f"model.{name}", ())
        if int(axis) >= len(shape):
            raise InputError(
                f"the weights are not a Whisper's: they lack model.{name} and hold "
                f"{few(sorted(shapes), 3) or 'nothing'}"
            )
        sizes[size] = shape[int(axis)]
    for half in HALVES:
        layers = re.findall(rf"model\.{half}\.layers\.(\d+)\.", "\n".join(shapes))
        sizes[f"{half}_layers"] = len(set(layers))
    return dims_from_hf(config, sizes)


def few(parts: Sequence[str], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    more = len(parts) - most
    return "; ".join(parts[:most]) + (f"; and {more} more" if more > 0 else "")


def _transposed(path: Path, leaf: np.ndarray) -> np.ndarray:
    """Reverses the axes of kernels: [in, out] ↔ [out, in], [time, in, out] ↔ [out, in, time]."""
    return leaf.T if path[-1] == "kernel" else leaf


def _paths(dims: WhisperDims) -> dict[Path, str]:
    return {name.ours: name.hf for name in names(dims.encoder_layers, dims.decoder_layers)}


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
    return {
        name: tensor
        for name, tensor in kept.items()
        if not name.endswith("k_proj.bias") or np.any(np.asarray(tensor))
    }
