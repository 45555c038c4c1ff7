"""Loads a Whisper from where people keep them, and writes an ordinary Transformers folder."""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flax_distil.cache import model_folder
from flax_distil.errors import InputError, read_json
from flax_distil.model.ctranslate2 import read_ctranslate2
from flax_distil.model.dims import WhisperDims, dims_from_hf, dims_to_hf
from flax_distil.model.generation import generation_config
from flax_distil.model.openai import read_openai
from flax_distil.model.processor import copy_processor
from flax_distil.model.spec import Params
from flax_distil.model.weights import from_hf, to_hf

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Not model*.safetensors: large-v3 has a second copy in float32, model.fp32-*.safetensors, of 6 GB.
HUB_FILES = ["*.json", "*.txt", WEIGHTS, "model-*-of-*.safetensors"]
SAVE_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a Transformers folder of Whisper holds."""

    dims: WhisperDims
    params: Params
    """Nested dict of float32 numpy arrays, layers by index."""
    config: dict[str, Any]
    """`config.json`."""
    generation: dict[str, Any]
    """`generation_config.json`."""
    source: Path
    """The folder with the tokenizer files."""


def load_checkpoint(name_or_folder: str | Path) -> Checkpoint:
    """The Whisper in a Transformers folder, a CTranslate2 folder or an OpenAI `.pt`, or by name.

    A name is one of `flax-distil fetch` (whisper-tiny.en) or of the Hugging Face hub
    (openai/whisper-base.en). Weights of any float type become float32.

    Raises:
        InputError: nothing is there, it cannot be read, or the tensors do not fit (all are named).
    """
    path = Path(name_or_folder).expanduser()
    if path.is_file():
        return _build(*read_openai(path), path.parent)
    if not path.exists():
        path = _by_name(str(name_or_folder))
    if (path / "model.bin").is_file():
        return _build(*read_ctranslate2(path), path)
    config = read_json(path / "config.json")
    dims = dims_from_hf(config)
    generation_file = path / "generation_config.json"
    if generation_file.is_file():
        generation = read_json(generation_file)
    else:
        generation = generation_config(
            dims,
            suppress=config.get("suppress_tokens"),
            suppress_first=config.get("begin_suppress_tokens"),
        )
    return _build(config, read_safetensors(path), generation, path)


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that Transformers loads as it is: weights, configurations, tokenizer.

    Everything is written beside `folder` first and moved in when it is complete, so that what was
    there stays good when the disk is full or the process is killed. `dtype` is float32, float16 or
    bfloat16.

    Raises:
        InputError: the folder cannot be written.
    """
    if dtype not in SAVE_DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(SAVE_DTYPES)}")
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
            _write(checkpoint, Path(name), dtype)
            _move(Path(name), folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder} could not be written, nothing there has changed: {error}"
        ) from error


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a Transformers folder, from one file or from its shards.

    Raises:
        InputError: there is no safetensors file, a shard is missing, or one is damaged.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        files = [folder / shard for shard in sorted(shards)]
    elif any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} has only pytorch_model.bin, a pickle, which can run code when it is read: "
            "load it in Transformers and save_pretrained() it, that writes model.safetensors"
        )
    else:
        raise InputError(f"{folder} has no {WEIGHTS}: it is no Transformers checkpoint")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}"
        )
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged ({error}): fetch it again") from None
    return tensors


def _build(
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    generation: dict[str, Any],
    source: Path,
) -> Checkpoint:
    dims = dims_from_hf(config)
    return Checkpoint(dims, from_hf(dims, tensors), config, generation, source)


def _by_name(name: str) -> Path:
    """The folder of a fetched model, or of one of the hub's, downloaded where needed."""
    if model_folder(name).is_dir():
        return model_folder(name)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise InputError(
            f"{name!r} is no folder, no .pt file and no fetched model: "
            f"`flax-distil fetch whisper-tiny.en` gets one, hub names look like openai/whisper-base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name!r} is no folder here, and the Hugging Face hub cannot be reached: "
            "download it elsewhere and name the folder, or `flax-distil fetch whisper-tiny.en`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name!r} is no folder here and the Hugging Face hub did not give it: {reason}"
        ) from error


def _write(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Write every file of the checkpoint into an empty folder."""
    tensors = {
        name: tensor.astype(SAVE_DTYPES[dtype], copy=False)
        for name, tensor in to_hf(checkpoint.dims, checkpoint.params).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    config |= dims_to_hf(checkpoint.dims) | {"dtype": dtype}
    generation = checkpoint.generation
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # safetensors makes it private
    copy_processor(checkpoint.source, folder, checkpoint.dims)


def _move(complete: Path, folder: Path) -> None:
    """Move the files of `complete` into `folder`, the weights last; an old index goes."""
    if not folder.exists():
        shutil.copymode(folder.parent, complete)  # a temporary folder is only its owner's
        os.rename(complete, folder)
        complete.mkdir()  # for the one who cleans it up
        return
    for file in sorted(complete.iterdir(), key=lambda file: file.name == WEIGHTS):
        os.replace(file, folder / file.name)
    (folder / INDEX).unlink(missing_ok=True)
