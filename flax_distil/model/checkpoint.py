"""Loads a Whisper from where people keep them, and writes an ordinary Transformers folder."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from flax_distil.cache import model_folder
from flax_distil.errors import InputError, read_json
from flax_distil.model.adapter import ADAPTER, merged, read_adapter
from flax_distil.model.ctranslate2 import read_ctranslate2
from flax_distil.model.dims import WhisperDims, check_architecture, dims_from_hf, dims_to_hf
from flax_distil.model.folder import replacing
from flax_distil.model.generation import completed
from flax_distil.model.openai import read_openai
from flax_distil.model.processor import copy_processor
from flax_distil.model.spec import Params
from flax_distil.model.tensors import INDEX, WEIGHTS, open_tensors, read_safetensors, whisper_names
from flax_distil.model.weights import dims_of, from_hf, to_hf
from flax_distil.text.tokens import WhisperTokens, load_tokens

__all__ = ["Checkpoint", "load_checkpoint", "read_safetensors", "save_checkpoint"]

log = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
# Not model*.safetensors: large-v3 has a second copy in float32, model.fp32-*.safetensors, of 6 GB.
SHARDS = "model-*-of-*.safetensors"
HUB_FILES = ["*.json", "*.txt", WEIGHTS, SHARDS, "adapter_model.safetensors"]
STALE = (INDEX, SHARDS, "pytorch_model*.bin*")  # would be read in place of the new weights
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
    """`generation_config.json`, completed. A model of one language has `language` and `task`."""
    source: Path
    """The folder with the tokenizer files."""

    def tokens(self) -> WhisperTokens:
        """Its vocabulary. Raises InputError where the tokenizer is missing or another model's."""
        return load_tokens(self.source, self.generation, self.dims.vocab)


def load_checkpoint(name_or_folder: str | Path) -> Checkpoint:
    """The Whisper in a Transformers or CTranslate2 folder, in an OpenAI `.pt`, or by name.

    A name is one of `flax-distil fetch` (whisper-tiny.en) or of the Hugging Face hub
    (openai/whisper-base.en, or openai/whisper-base.en@REVISION for a branch, tag or commit). A LoRA
    adapter's folder gives its base model with the adapter merged. Weights of any float type become
    float32.

    Raises:
        InputError: it does not exist, cannot be read, or the tensors do not fit.
    """
    path = Path(name_or_folder).expanduser()
    if not path.exists():
        path = _by_name(str(name_or_folder))
    if (path / "model.bin").is_file():
        return _build(*read_ctranslate2(path), path)
    if (path / ADAPTER).is_file() and not (path / WEIGHTS).is_file():
        return _with_adapter(path)
    if path.is_dir() and not (path / CONFIG).is_file():
        alone = sorted(path.glob("*.pt"))
        path = alone[0] if len(alone) == 1 else path
    if path.is_file():
        return _build(*read_openai(path), path.parent)
    config = read_json(path / CONFIG)
    check_architecture(config)
    tensors = whisper_names(open_tensors(path))
    if config.get("tie_word_embeddings") is False and "proj_out.weight" not in tensors:
        raise InputError(
            f"{path} has tie_word_embeddings false, and its proj_out.weight is missing"
        )
    written = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    dims = dims_of(config, {name: tensor.shape for name, tensor in tensors.items()})
    generation = completed(written, config, dims, path)
    return Checkpoint(dims, from_hf(dims, tensors), config, generation, path)


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that Transformers loads as it is: weights, configurations, tokenizer.

    The folder is replaced whole (`replacing`): a full disk or a kill never leaves old and new files
    mixed. Files in it that are not a model's stay. `dtype` is float32, float16 or bfloat16.

    Raises:
        InputError: the folder cannot be written.
    """
    with replacing(Path(folder), CONFIG, STALE) as complete:
        write_transformers(checkpoint, complete, dtype)


def _build(
    config: dict[str, Any],
    tensors: Mapping[str, Any],
    generation: dict[str, Any],
    source: Path,
) -> Checkpoint:
    dims = dims_from_hf(config)
    return Checkpoint(dims, from_hf(dims, tensors), config, generation, source)


def _with_adapter(path: Path) -> Checkpoint:
    """The base model of an adapter, with its changes; the tokenizer is the adapter's, if any."""
    adapter = read_adapter(path)
    if (Path(adapter.base) / ADAPTER).is_file():
        raise InputError(
            f"{path} is an adapter of {adapter.base}, an adapter too: merge that first"
        )
    try:
        base = load_checkpoint(adapter.base)
    except InputError as error:
        raise InputError(f"{path} is a LoRA adapter of {adapter.base}: {error}") from None
    tensors = merged(to_hf(base.dims, base.params), adapter)
    source = path if (path / "tokenizer.json").is_file() else base.source
    return replace(base, params=from_hf(base.dims, tensors), source=source)


def _by_name(name: str) -> Path:
    """The folder of a fetched model, or of one of the hub's, downloaded where needed."""
    if model_folder(name).is_dir():
        return model_folder(name)
    name, _, revision = name.partition("@")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise InputError(
            f"{name!r} is not a folder, a .pt file or a fetched model: "
            f"`flax-distil fetch whisper-tiny.en` gets one, hub names look like openai/whisper-base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name!r} is not a folder here, and the Hugging Face hub cannot be reached: "
            "download it elsewhere and name the folder, or `flax-distil fetch whisper-tiny.en`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name!r} is not a folder here and the Hugging Face hub refused it: {reason}"
        ) from error


def write_transformers(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Write every file of the checkpoint into an empty folder."""
    if dtype not in SAVE_DTYPES:
        raise InputError(f"dtype {dtype!r} is none of {', '.join(SAVE_DTYPES)}")
    tensors = {
        name: tensor.astype(SAVE_DTYPES[dtype], copy=False)
        for name, tensor in to_hf(checkpoint.dims, checkpoint.params).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    outdated = ("torch_dtype", "forced_decoder_ids")
    config = {key: value for key, value in checkpoint.config.items() if key not in outdated}
    config |= dims_to_hf(checkpoint.dims) | {"dtype": dtype}
    generation = checkpoint.generation
    for name, content in ((CONFIG, config), (GENERATION, generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes it private
    copy_processor(checkpoint.source, folder, checkpoint.dims)
