"""CTranslate2's `model.bin`, the file of faster-whisper, to and from Transformers' tensor names.

The file, little endian: u32 version · str spec · u32 revision · u32 n · n × (str name, u8 rank,
u32 sizes[rank], u8 dtype, u32 bytes, data) · u32 n · n × (str alias, str target); a str is a u16
length, that many bytes, the last of them NUL. Attention projections are fused by rows: q, k, v in
self-attention, k, v in cross-attention, with a zero bias for the keys, which have none.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.generation import completed, special_ids, token_ids

VERSION = 6
SPEC = "WhisperSpec"
REVISION = 3
# The index in this tuple is the type's number in the file.
DTYPES = tuple(
    np.dtype(kind)
    for kind in (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
)
GELU = np.int8(3)
RANK = 3  # of a convolution's kernel, the largest
FACTS = {  # Transformers' name of what config.json says -> CTranslate2's
    "suppress_tokens": "suppress_ids",
    "begin_suppress_tokens": "suppress_ids_begin",
    "alignment_heads": "alignment_heads",
}


def read_ctranslate2(
    folder: str | Path,
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """The Whisper in a CTranslate2 folder as (config, tensors, generation config) of Transformers.

    Tensors are float32 under Transformers' names; int8 and int16 weights are multiplied out.

    Raises:
        InputError: the file is cut off, damaged, or not a Whisper's.
    """
    folder = Path(folder)
    path = folder / "model.bin"
    if not path.is_file():
        raise InputError(f"{path} does not exist: a CTranslate2 folder has a model.bin")
    variables = _read_variables(path)
    dims = _dims(path, variables)
    tensors: dict[str, np.ndarray] = {}
    for name, parts in _names(dims).items():
        if name not in variables:
            raise InputError(f"{path} lacks {name}: convert the model again")
        whole = _dequantised(path, name, variables)
        if whole.shape[0] % len(parts):
            raise InputError(f"{path}: {whole.shape[0]} rows of {name} are not {len(parts)} parts")
        for part, value in zip(parts, np.split(whole, len(parts)), strict=True):
            if part is not None:
                tensors[part] = value
            elif np.any(value):
                raise InputError(f"{path}: {name} has a bias for the keys, Whisper has none")

    # What it knows about decoding; old folders have none.
    facts = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    known = {ours: facts[theirs] for ours, theirs in FACTS.items() if theirs in facts}
    generation = completed(known, {}, dims, folder)
    return dims_to_hf(dims) | token_ids(dims, special_ids(dims, folder)), tensors, generation


def write_ctranslate2(
    folder: str | Path,
    dims: WhisperDims,
    tensors: Mapping[str, np.ndarray],
    generation: Mapping[str, Any],
    dtype: str = "float16",
) -> None:
    """Write `model.bin` and the `config.json` beside it; `tensors` has Transformers' names.

    `dtype` is float32, float16 or bfloat16; CTranslate2 quantises further when it loads.
    """
    kinds = {kind.name: kind for kind in DTYPES}
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype {dtype!r}: CTranslate2 files are float32, float16 or bfloat16")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    variables = _constants(dims) | {
        name: _fuse(tensors, parts).astype(kinds[dtype]) for name, parts in _names(dims).items()
    }
    with (folder / "model.bin").open("wb") as file:
        file.write(struct.pack("<I", VERSION) + _string(SPEC))
        file.write(struct.pack("<II", REVISION, len(variables)))
        for name in sorted(variables):  # CTranslate2 itself writes them in this order
            _write_variable(file, name, np.asarray(variables[name]))
        file.write(struct.pack("<I", 1))
        file.write(_string("decoder/projection/weight") + _string("decoder/embeddings/weight"))
    facts = {theirs: generation.get(ours) or [] for ours, theirs in FACTS.items()}
    facts["lang_ids"] = sorted(generation.get("lang_to_id", {}).values())
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _names(dims: WhisperDims) -> dict[str, tuple[str | None, ...]]:
    """CTranslate2's name of every weight -> the Transformers tensors stacked in it, by rows."""
    table = {
        "encoder/conv1": ("model.encoder.conv1",),
        "encoder/conv2": ("model.encoder.conv2",),
        "encoder/layer_norm": ("model.encoder.layer_norm",),
        "decoder/layer_norm": ("model.decoder.layer_norm",),
    }
    for side, layers in (("encoder", dims.encoder_layers), ("decoder", dims.decoder_layers)):
        for layer in range(layers):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            attention = f"{ours}.self_attn"
            table |= {
                f"{theirs}/self_attention/linear_0": tuple(f"{attention}.{x}_proj" for x in "qkv"),
                f"{theirs}/self_attention/linear_1": (f"{attention}.out_proj",),
                f"{theirs}/self_attention/layer_norm": (f"{ours}.self_attn_layer_norm",),
                f"{theirs}/ffn/linear_0": (f"{ours}.fc1",),
                f"{theirs}/ffn/linear_1": (f"{ours}.fc2",),
                f"{theirs}/ffn/layer_norm": (f"{ours}.final_layer_norm",),
            }
            if side == "decoder":
                cross = f"{ours}.encoder_attn"
                table |= {
                    f"{theirs}/attention/linear_0": (f"{cross}.q_proj",),
                    f"{theirs}/attention/linear_1": (f"{cross}.k_proj", f"{cross}.v_proj"),
                    f"{theirs}/attention/linear_2": (f"{cross}.out_proj",),
                    f"{theirs}/attention/layer_norm": (f"{ours}.encoder_attn_layer_norm",),
                }
    names: dict[str, tuple[str | None, ...]] = {
        "encoder/position_encodings/encodings": ("model.encoder.embed_positions.weight",),
        "decoder/position_encodings/encodings": ("model.decoder.embed_positions.weight",),
        "decoder/embeddings/weight": ("model.decoder.embed_tokens.weight",),
    }
    for theirs, modules in table.items():
        weight, bias = ("gamma", "beta") if theirs.endswith("layer_norm") else ("weight", "bias")
        names[f"{theirs}/{weight}"] = tuple(f"{module}.weight" for module in modules)
        names[f"{theirs}/{bias}"] = tuple(
            None if module.endswith("k_proj") else f"{module}.bias" for module in modules
        )
    return names


def _read_variables(path: Path) -> dict[str, np.ndarray]:
    """Every variable of the file by name; views into one read of it."""
    data = memoryview(path.read_bytes())
    position = 0

    def take(count: int) -> memoryview:
        nonlocal position
        if position + count > len(data):
            raise InputError(
                f"{path} is cut off: {count} bytes are due at byte {position:,}, the file has "
                f"{len(data):,}; fetch it again"
            )
        position += count
        return data[position - count : position]

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", take(struct.calcsize(kind)))[0]

    def string() -> str:
        try:
            return bytes(take(number("H"))[:-1]).decode()
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged at byte {position:,}: fetch it again") from None

    version, spec = number("I"), string()
    if version != VERSION or spec != SPEC:
        raise InputError(
            f"{path} is version {version} of {spec[:40]!r}, not version {VERSION} of {SPEC!r}: "
            "convert the model with a current CTranslate2"
        )
    revision = number("I")
    if revision != REVISION:
        raise InputError(f"{path} is revision {revision} of {SPEC}, this reads {REVISION}")
    variables = {}
    for _ in range(number("I")):
        name, rank = string(), number("B")
        if rank > RANK:
            raise InputError(f"{path} is damaged at {name!r}: it has {rank} dimensions")
        shape = tuple(number("I") for _ in range(rank))
        kind, size = number("B"), number("I")
        if kind >= len(DTYPES) or size != DTYPES[kind].itemsize * int(np.prod(shape, dtype=object)):
            raise InputError(
                f"{path} is damaged at {name!r}: type {kind}, sizes {shape}, {size:,} bytes do "
                "not agree; fetch it again"
            )
        variables[name] = np.frombuffer(take(size), DTYPES[kind]).reshape(shape)
    for _ in range(number("I")):  # equal variables are stored once: the projection, zero biases
        alias, target = string(), string()
        if target not in variables:
            raise InputError(f"{path}: {alias} refers to {target}, which does not exist")
        variables[alias] = variables[target]
    return variables


def _dims(path: Path, variables: Mapping[str, np.ndarray]) -> WhisperDims:
    """The model's sizes, from the shapes of its variables."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in variables or variables[name].ndim != rank:
            raise InputError(f"{path} lacks {name} of {rank} dimensions: convert the model again")
        return variables[name].shape

    def layers(side: str) -> int:
        found = (re.match(rf"{side}/layer_(\d+)/", name) for name in variables)
        return len({layer[1] for layer in found if layer})

    def heads(side: str) -> int:
        shape(f"{side}/num_heads", 0)
        return int(variables[f"{side}/num_heads"])

    vocab, width = shape("decoder/embeddings/weight", 2)
    return WhisperDims(
        mels=shape("encoder/conv1/weight", 3)[1],
        vocab=vocab,
        width=width,
        encoder_layers=layers("encoder"),
        encoder_heads=heads("encoder"),
        decoder_layers=layers("decoder"),
        decoder_heads=heads("decoder"),
        encoder_ffn=shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_ffn=shape("decoder/layer_0/ffn/linear_0/weight", 2)[0],
        audio_positions=shape("encoder/position_encodings/encodings", 2)[0],
        text_positions=shape("decoder/position_encodings/encodings", 2)[0],
    )


def _dequantised(path: Path, name: str, variables: Mapping[str, np.ndarray]) -> np.ndarray:
    """The variable in float32; integers are divided by their scale, one a row or one in all."""
    value = variables[name].astype(np.float32)
    if variables[name].dtype.kind != "i":
        return value
    scale = variables.get(f"{name}_scale")
    if scale is None:
        raise InputError(f"{path}: {name} is {variables[name].dtype} and has no {name}_scale")
    if scale.size not in (1, value.shape[0]):
        raise InputError(f"{path}: {name} has {value.shape[0]} rows and {scale.size} scales")
    return value / scale.astype(np.float32).reshape(-1, *(1,) * (value.ndim - 1))


def _fuse(tensors: Mapping[str, np.ndarray], parts: tuple[str | None, ...]) -> np.ndarray:
    """The named tensors stacked by rows, zeros for the bias that keys lack."""
    missing = [part for part in parts if part is not None and part not in tensors]
    if missing:
        raise InputError(f"the checkpoint lacks {', '.join(missing)}")
    like = next(tensors[part] for part in parts if part is not None)
    return np.concatenate(
        [np.zeros_like(like) if part is None else tensors[part] for part in parts]
    )


def _constants(dims: WhisperDims) -> dict[str, np.ndarray | np.generic]:
    """What CTranslate2 stores of the architecture, beside the weights."""
    decoder = {
        "activation": GELU,
        "alibi": np.int8(0),
        "alignment_heads": np.int16(1),
        "alignment_layer": np.int16(-1),
        "num_heads": np.int16(dims.decoder_heads),
        "pre_norm": np.int8(1),
        "scale_embeddings": np.int8(0),
        "start_from_zero_embedding": np.int8(0),
    }
    constants: dict[str, np.ndarray | np.generic] = {
        f"decoder/{name}": value for name, value in decoder.items()
    }
    return constants | {"encoder/num_heads": np.int16(dims.encoder_heads)}


def _write_variable(file: BinaryIO, name: str, value: np.ndarray) -> None:
    kind = DTYPES.index(value.dtype)
    header = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    file.write(_string(name) + header + struct.pack("<BI", kind, value.nbytes))
    file.write(np.ascontiguousarray(value).tobytes())


def _string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data
