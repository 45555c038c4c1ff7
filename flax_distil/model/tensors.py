"""Tensors of checkpoints by name, in safetensors, PyTorch's pickles and Flax's msgpack."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open

from flax_distil.errors import InputError
from flax_distil.model.dims import SIZES, WhisperDims
from flax_distil.model.weights import names, names_in

WEIGHTS = "model.safetensors"
# Not model*.safetensors: large-v3 has a second copy in float32, model.fp32-*.safetensors, of 6 GB.
SHARDS = "model-*-of-*.safetensors"
# Where there are no safetensors, as in checkpoints of 2022.
OLD_WEIGHTS = ["pytorch_model*.bin", "flax_model*.msgpack"]
LFS = b"version https://git-lfs"
FLAX_KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
SCANNED = re.compile(r"Flax(En|De)coderScanLayers")  # of distil-whisper's Flax models
# Wrappers (torch.compile, DataParallel, PEFT) add a prefix to Whisper's names.
NAME = re.compile(r"(?:^|\.)((?:encoder|decoder)\.(?:layers|conv[12]|embed_\w+|layer_norm)\.\S+)$")


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file; `np.asarray` reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def open_transformers(folder: Path) -> dict[str, Any]:
    """The tensors of a Transformers folder, `Stored` or arrays: safetensors, whole or in shards,
    else PyTorch's pickle, else Flax's msgpack.

    Raises:
        InputError: there is none, a shard is missing, or one is damaged.
    """
    for whole, shards, read in (
        (WEIGHTS, SHARDS, open_safetensors),
        ("pytorch_model.bin", "pytorch_model-*-of-*.bin", _open_pickle),
        ("flax_model.msgpack", "flax_model-*-of-*.msgpack", open_flax),
    ):
        files = [folder / whole] if (folder / whole).is_file() else sorted(folder.glob(shards))
        total = files[0].stem.rpartition("-of-")[2] if files else ""
        if total.isdigit() and len(files) != int(total):
            raise InputError(f"{folder} has {len(files)} of {int(total)} shards: fetch it again")
        if tensors := {name: tensor for file in files for name, tensor in read(file).items()}:
            return tensors
    raise InputError(f"{folder} has no {WEIGHTS}: it is not a Transformers checkpoint")


def open_flax(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a Flax Whisper of Transformers 4 or distil-whisper, under PyTorch's names.

    The tree's path is PyTorch's name, but for its last part. Scanned layers are one array with a
    leading axis. Nothing in msgpack can run code.

    Raises:
        InputError: the file is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        tree: dict[str, Any] = dict(flatten_dict(msgpack_restore(file.read_bytes()), sep="/"))
        for key, array in tree.items():
            *path, kind = key.split("/")
            name = ".".join([*path, FLAX_KINDS.get(kind, kind)])
            for layer, one in enumerate(array if SCANNED.search(name) else [array]):
                one = one.T if kind == "kernel" else one
                tensors[SCANNED.sub(str(layer), name)] = np.asarray(one)
    except Exception as error:  # msgpack has a dozen kinds
        raise InputError(
            f"{file} is not a Flax checkpoint ({error!r:.200}): fetch it again"
        ) from None
    return tensors


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises InputError if it is damaged."""
    with file.open("rb") as start:
        if start.read(len(LFS)) == LFS:
            raise InputError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    try:
        opened: Any = safe_open(file, framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}): fetch it again") from None
    # `name=name`: each reads its own.
    return {
        name: Stored(
            tuple(part.get_shape()), part.get_dtype(), lambda name=name: opened.get_tensor(name)
        )
        for name, part in slices.items()
    }


def import_torch(what: str) -> Any:
    """PyTorch, which `what` needs. Raises InputError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise InputError(f"{what} needs PyTorch: pip install 'flax-distil[torch]'") from None
    return torch


def _load_torch(path: Path) -> Any:
    """The content of a PyTorch file, read with `weights_only`: it cannot run code.

    Raises:
        InputError: PyTorch is missing, or the file contains other objects than tensors and numbers.
    """
    torch = import_torch(f"{path} is a pickle, which")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or unsafe file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as PyTorch weights: {reason[:200]}") from error


def _open_pickle(path: Path) -> dict[str, Stored]:
    return _stored(path, _load_torch(path))


def _stored(path: Path, state: Any) -> dict[str, Stored]:
    """A state dict's tensors, to become float32 when they are read."""
    import torch

    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise InputError(f"{path} does not hold named tensors alone: it is not a state dict")
    return {
        str(name): Stored(
            tuple(tensor.shape), str(tensor.dtype), lambda tensor=tensor: tensor.float().numpy()
        )
        for name, tensor in state.items()
    }


def whisper_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors without prefixes of wrappers, and with the prefix `model.`.

    `_orig_mod.` (torch.compile), `module.` (data parallel) and other prefixes go; a bare
    `WhisperModel` has no `model.`. Names that are not Whisper's stay, to be reported.

    Raises:
        InputError: two tensors get the same name.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        plain = name.replace("_orig_mod.", "")
        if found := NAME.search(plain):
            plain = f"model.{found[1]}"
        elif plain.endswith("proj_out.weight"):
            plain = "proj_out.weight"
        if plain in renamed:
            raise InputError(f"the weights hold {plain} twice, once as {name}: save one model only")
        renamed[plain] = tensor
    return renamed


def read_openai(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The sizes in an OpenAI `.pt` by their names in `config.json`, and its tensors.

    Tensors are under Transformers' names; a name that is not in the table keeps its own, to be
    reported.

    Raises:
        InputError: PyTorch is missing, or the file is not an OpenAI Whisper's.
    """
    saved = _load_torch(path)
    if not isinstance(saved, dict) or not {"dims", "model_state_dict"} <= saved.keys():
        raise InputError(f"{path} lacks 'dims' or 'model_state_dict': it is not an OpenAI Whisper")
    sizes = saved["dims"] if isinstance(saved["dims"], dict) else {}
    stored = _stored(path, saved["model_state_dict"])
    theirs = {name.openai: name.hf for name in names_in(stored)}
    config = {key: sizes[size] for _, key, size, *_ in SIZES if size in sizes}
    return config, {theirs.get(name, name): tensor for name, tensor in stored.items()}


def to_openai(
    dims: WhisperDims, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """OpenAI's (dims, state dict) of tensors under Transformers' names; `.pt` holds these two.

    Raises:
        InputError: the feed-forward layers are not four times as wide, which the format assumes.
    """
    if {dims.encoder_ffn, dims.decoder_ffn} != {4 * dims.width}:
        raise InputError(
            f"feed-forward sizes {dims.encoder_ffn} and {dims.decoder_ffn}: OpenAI's format needs "
            f"4 x width = {4 * dims.width}"
        )
    sizes = {size: getattr(dims, ours) for ours, _, size, *_ in SIZES if size != "-"}
    table = names(dims.encoder_layers, dims.decoder_layers)
    return sizes | {"n_text_state": dims.width}, {name.openai: tensors[name.hf] for name in table}
