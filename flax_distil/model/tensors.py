"""Tensors of a checkpoint by Transformers' names: shapes and types first, numbers when needed."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flax_distil.errors import InputError, read_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLE = "pytorch_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")
LFS = b"version https://git-lfs"
# Wrappers (torch.compile, DataParallel, PEFT) put their own name before Whisper's.
NAME = re.compile(r"(?:^|\.)((?:encoder|decoder)\.(?:layers|conv[12]|embed_\w+|layer_norm)\.\S+)$")


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that is still on disk; `np.asarray` reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a Transformers folder: safetensors, whole or in shards, else PyTorch's pickle.

    Raises:
        InputError: there is none, a shard is missing, or one is damaged or not of a float type.
    """
    for weights, opened in ((WEIGHTS, open_safetensors), (PICKLE, _open_pickle)):
        if files := _files(folder, weights):
            tensors: dict[str, Stored] = {}
            for file in files:
                tensors |= opened(file)
            return tensors
    raise InputError(f"{folder} has no {WEIGHTS}: it is not a Transformers checkpoint")


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a Transformers folder under Transformers' names, in memory."""
    return {name: tensor.read() for name, tensor in whisper_names(open_tensors(folder)).items()}


def whisper_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors without what wrappers put before their names, and with `model.`.

    `_orig_mod.` (torch.compile), `module.` (data parallel) and other prefixes go; a bare
    `WhisperModel` has no `model.`. Names that are not Whisper's stay, to be reported.

    Raises:
        InputError: two tensors have one name then.
    """
    renamed: dict[str, Stored] = {}
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


def _files(folder: Path, weights: str) -> list[Path]:
    """The one file, or the shards that its index names."""
    if (folder / weights).is_file():
        return [folder / weights]
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return []
    shards = read_json(index).get("weight_map")
    named = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    # A name with a separator would read files of other folders.
    outside = sorted(name for name in named if Path(name).name != name or "\0" in name)
    if outside or not named:
        what = f"the shard {outside[0]!r} outside its folder" if outside else "no shards"
        raise InputError(f"{index} names {what}: fetch it again")
    files = [folder / name for name in sorted(named)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:4])}"
        )
    return files


def open_safetensors(file: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises InputError where it is damaged or holds no floats."""
    with file.open("rb") as start:
        if start.read(len(LFS)) == LFS:
            raise InputError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull`")
    try:
        opened: Any = safe_open(file, framework="numpy")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}): fetch it again") from None
    check_types(file, ((name, part.get_dtype(), FLOATS) for name, part in slices.items()))
    # `name=name`: each reads its own.
    return {
        name: Stored(tuple(part.get_shape()), lambda name=name: opened.get_tensor(name))
        for name, part in slices.items()
    }


def _open_pickle(file: Path) -> dict[str, Stored]:
    return stored_torch(file, load_torch(file, "PyTorch weights"))


def load_torch(path: Path, what: str) -> Any:
    """The content of a PyTorch file, read with `weights_only`: it cannot run code.

    Raises:
        InputError: PyTorch is missing, or the file holds other things than tensors and numbers.
    """
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} is a pickle, which needs PyTorch to be read: pip install 'flax-distil[torch]',"
            " or load it in Transformers elsewhere and save_pretrained() it as model.safetensors"
        ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or unsafe file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as {what}: {reason[:200]}") from error


def stored_torch(path: Path, state: Any) -> dict[str, Stored]:
    """A state dict's tensors, to become float32 when they are read.

    Raises:
        InputError: it is not a state dict of float tensors.
    """
    import torch

    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise InputError(f"{path} does not hold named tensors alone: it is not a state dict")
    known = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    check_types(path, ((str(name), tensor.dtype, known) for name, tensor in state.items()))
    return {
        str(name): Stored(tuple(tensor.shape), lambda tensor=tensor: tensor.float().numpy())
        for name, tensor in state.items()
    }


def check_types(path: Path, types: Iterable[tuple[str, Any, tuple]]) -> None:
    """Raises InputError for the first (name, type, known types) of another type."""
    for name, kind, known in types:
        if kind not in known:
            raise InputError(
                f"{path}: {name} is of type {kind}, this reads {', '.join(map(str, known))}: "
                "save the model in one of these"
            )
