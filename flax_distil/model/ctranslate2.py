"""CTranslate2's `model.bin`, the file of faster-whisper, to and from Transformers' tensor names.

The file, little endian: u32 version · str spec · u32 revision · u32 n · n × (str name, u8 rank,
u32 sizes[rank], u8 dtype, u32 bytes, data) · u32 n · n × (str alias, str target); a str is a u16
length, that many bytes, the last of them NUL. Attention projections are fused by rows: q, k, v in
self-attention, k, v in cross-attention, with a zero bias for the keys, which have none.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import WhisperDims
from flax_distil.model.weights import Name, names, names_in

HEADER = (6, "WhisperSpec", 3)  # version, specification and its revision
# The index in this tuple is the type's number in the file.
DTYPES = tuple(
    np.dtype(kind)
    for kind in (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
)
GELU = 3
CONSTANTS = {  # of the architecture; -1: the layer before the last
    "decoder/activation": np.int8(GELU),
    "decoder/alibi": np.int8(0),
    "decoder/alignment_heads": np.int16(1),
    "decoder/alignment_layer": np.int16(-1),
    "decoder/pre_norm": np.int8(1),
    "decoder/scale_embeddings": np.int8(0),
    "decoder/start_from_zero_embedding": np.int8(0),
}
FACTS = {  # key in generation_config.json → key in CTranslate2's config.json
    "suppress_tokens": "suppress_ids",
    "begin_suppress_tokens": "suppress_ids_begin",
    "alignment_heads": "alignment_heads",
}


def read_ctranslate2(folder: Path) -> tuple[dict[str, int], dict[str, np.ndarray], dict[str, Any]]:
    """The heads of a CTranslate2 folder's Whisper by their names in `config.json`, its tensors, and
    what it has of a generation config.

    Tensors are float32 under Transformers' names; int8 and int16 weights are dequantised.

    Raises:
        InputError: the file is cut off, damaged, or not a Whisper's.
    """
    variables = read_variables(folder / "model.bin")
    tensors: dict[str, np.ndarray] = {}
    for name, parts in _fused(names_in(variables, key_bias=True)).items():
        if name in variables:
            whole = _dequantised(name, variables)
            if len(whole) % len(parts):
                raise InputError(
                    f"{name} of {folder} has {len(whole)} rows, not {len(parts)} parts"
                )
            tensors |= zip(parts, np.split(whole, len(parts)), strict=True)
    heads = {
        f"{half}_attention_heads": int(variables[f"{half}/num_heads"])
        for half in ("encoder", "decoder")
        if f"{half}/num_heads" in variables
    }
    # Settings of decoding; old folders have none.
    facts = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return heads, tensors, {ours: facts[key] for ours, key in FACTS.items() if key in facts}


def write_ctranslate2(
    folder: Path,
    dims: WhisperDims,
    tensors: Mapping[str, np.ndarray],
    generation: Mapping[str, Any],
    dtype: str = "float16",
) -> None:
    """Write `model.bin` and the `config.json` beside it; `tensors` has Transformers' names.

    `dtype` is float32, float16 or bfloat16; CTranslate2 quantises further when it loads.
    """
    table = _fused(names(dims.encoder_layers, dims.decoder_layers, key_bias=True))
    no_bias = np.zeros(dims.width, np.float32)  # of keys
    variables = CONSTANTS | {
        "encoder/num_heads": np.int16(dims.encoder_heads),
        "decoder/num_heads": np.int16(dims.decoder_heads),
    }
    for name, parts in table.items():
        stacked = [no_bias if part.endswith("k_proj.bias") else tensors[part] for part in parts]
        variables[name] = np.concatenate(stacked).astype(dtype)
    write_variables(folder / "model.bin", variables)
    facts = {theirs: generation.get(ours) or [] for ours, theirs in FACTS.items()}
    facts["lang_ids"] = sorted(generation.get("lang_to_id", {}).values())
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _fused(table: Iterable[Name]) -> dict[str, list[str]]:
    """CTranslate2's name of every weight → the Transformers tensors stacked in it, by rows."""
    fused = defaultdict(list)
    for name in table:
        fused[name.ctranslate2].append(name.hf)
    return fused


def _dequantised(name: str, variables: Mapping[str, np.ndarray]) -> np.ndarray:
    """The variable in float32; integers are divided by their scale, one a row or one in all."""
    value = variables[name].astype(np.float32)
    if variables[name].dtype.kind != "i":
        return value
    scale = variables.get(f"{name}_scale", np.zeros(0, np.float32))
    if scale.size not in (1, len(value)):
        raise InputError(f"{name} has {len(value)} rows and {scale.size} scales ({name}_scale)")
    return value / scale.astype(np.float32).reshape(-1, *(1,) * (value.ndim - 1))


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Every variable of the file by name; views into one read of it.

    Raises:
        InputError: the file is damaged, or of another version or model.
    """
    data, position, header = path.read_bytes(), 0, ()
    variables: dict[str, np.ndarray] = {}

    def read(kind: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from(f"<{kind}", data, position)
        position += struct.calcsize(kind)
        return value

    def string() -> str:
        return read(f"{read('H')}s")[:-1].decode()

    try:
        header = read("I"), string(), read("I")
        for _ in range(read("I") if header == HEADER else 0):
            name = string()
            shape = [read("I") for _ in range(read("B"))]
            kind, size = DTYPES[read("B")], read("I")
            values = np.frombuffer(data, kind, size // kind.itemsize, position)
            variables[name] = values.reshape(shape)
            position += size
        # Equal variables are stored once: the projection, zero biases.
        for _ in range(read("I") if header == HEADER else 0):
            alias = string()
            variables[alias] = variables[string()]
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{path} is damaged or cut off at byte {position:,} of {len(data):,} ({error}): "
            "fetch it again"
        ) from None
    if header != HEADER:
        raise InputError(
            f"{path} has version, model and revision {header}, not {HEADER}: "
            "convert the model with a current CTranslate2"
        )
    return variables


def write_variables(path: Path, variables: Mapping[str, np.ndarray | np.generic]) -> None:
    """The inverse of `read_variables`, with the projection as an alias of the embedding."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    version, spec, revision = HEADER
    with path.open("wb") as file:
        file.write(struct.pack("<I", version) + string(spec))
        file.write(struct.pack("<II", revision, len(variables)))
        for name, value in sorted(variables.items()):  # CTranslate2 itself writes this order
            file.write(string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape))
            file.write(struct.pack("<BI", DTYPES.index(value.dtype), value.nbytes))
            file.write(np.ascontiguousarray(value).tobytes())
        file.write(struct.pack("<I", 1))
        file.write(string("decoder/projection/weight") + string("decoder/embeddings/weight"))
