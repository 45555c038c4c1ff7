"""Loads Whisper checkpoints in all published formats and saves Transformers folders."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from flax_distil.cache import model_folder
from flax_distil.errors import InputError, read_json
from flax_distil.model.adapter import ADAPTER, merge_adapter, read_adapter
from flax_distil.model.ctranslate2 import read_ctranslate2
from flax_distil.model.dims import WhisperDims, dims_to_hf
from flax_distil.model.generation import completed
from flax_distil.model.processor import copy_processor
from flax_distil.model.spec import Params
from flax_distil.model.tensors import (
    OLD_WEIGHTS,
    SHARDS,
    WEIGHTS,
    open_transformers,
    read_openai,
    whisper_names,
)
from flax_distil.model.weights import dims_of, from_hf, to_hf
from flax_distil.text.tokens import WhisperTokens, load_tokens

log = logging.getLogger(__name__)

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
# Transformers' default, which a configuration may leave out; the weights have all other sizes.
HEADS = {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
# Fetched models whose tokenizer is that of all published models with as many tokens.
TOKENIZERS = {51_864: "whisper-tiny.en", 51_865: "whisper-base"}
HUB_FILES = ["*.json", "*.txt", WEIGHTS, SHARDS, "adapter_model.safetensors"]
OTHER_WEIGHTS = (*OLD_WEIGHTS, "model.bin")  # tried in turn where a hub model has no safetensors
# They would be read in place of the new weights.
STALE = (f"{WEIGHTS}.index.json", SHARDS, *(f"{pattern}*" for pattern in OLD_WEIGHTS))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a Transformers folder of Whisper."""

    dims: WhisperDims
    params: Params
    """Nested dict of float32 numpy arrays, layers by index."""
    config: dict[str, Any]
    """`config.json`; keys that the sizes or the generation config decide may be missing."""
    generation: dict[str, Any]
    """`generation_config.json`, completed. A model of one language has `language` and `task`."""
    source: Path
    """The folder with the tokenizer files."""

    def tokens(self) -> WhisperTokens:
        """Its vocabulary. Raises InputError where the tokenizer is missing or another model's."""
        return load_tokens(self.source, self.generation, self.dims.vocab)


def load_checkpoint(name_or_folder: str | Path) -> Checkpoint:
    """The Whisper in a Transformers or CTranslate2 folder, in an OpenAI `.pt`, or by name.

    What a checkpoint of Transformers' Trainer or of Accelerate lacks (configuration, tokenizer) is
    taken from the folder above it. A LoRA adapter's folder gives its base model with the adapter
    merged. A name is one of `flax-distil fetch` (whisper-tiny.en) or of the Hugging Face hub
    (openai/whisper-base.en, or openai/whisper-base.en@REVISION for a branch, tag or commit).
    Weights of any float type become float32.

    Raises:
        InputError: it does not exist, cannot be read, or the tensors do not fit.
    """
    config, tensors, generation, source = _read(_find(name_or_folder))
    tensors = whisper_names(tensors)
    dims = dims_of(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if config.get("tie_word_embeddings") is False and "proj_out.weight" not in tensors:
        raise InputError(
            f"{source} has tie_word_embeddings false, and its proj_out.weight is missing"
        )
    source = _tokenizer_folder(source, dims)
    generation = completed(generation, config, dims, source)
    return Checkpoint(dims, from_hf(dims, tensors), config, generation, source)


def _find(name_or_folder: str | Path) -> Path:
    """A file or folder as it is, else that of a fetched model, else one of the hub, downloaded."""
    name, path = str(name_or_folder), Path(name_or_folder).expanduser()
    if path.exists():
        return path
    if model_folder(name).is_dir():
        return model_folder(name)
    name, _, revision = name.partition("@")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise InputError(
            f"{name!r} is not a folder, a .pt file or a fetched model: "
            "`flax-distil fetch whisper-tiny.en` gets one, hub names look like openai/whisper-base"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = partial(snapshot_download, name, revision=revision or None)
    try:
        folder = Path(download(allow_patterns=HUB_FILES))
        for pattern in OTHER_WEIGHTS:
            if not any(folder.glob(one) for one in ("*.safetensors", *OTHER_WEIGHTS)):
                download(allow_patterns=[pattern])
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name!r} is not a local folder and cannot be downloaded from the Hugging Face hub "
            f"({reason}): download it elsewhere and name the folder, or `flax-distil fetch` a model"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Any], dict[str, Any], Path]:
    """`config.json`, tensors, generation config and the folder of the tokenizer, in any format."""
    if (path / "model.bin").is_file():
        return *read_ctranslate2(path), path
    if (path / ADAPTER).is_file() and not (path / WEIGHTS).is_file():
        name, scale, matrices = read_adapter(path)
        if (Path(name) / ADAPTER).is_file():
            raise InputError(f"{path} is an adapter of {name}, an adapter too: merge that first")
        try:
            config, tensors, generation, source = _read(_find(name))
        except InputError as error:
            raise InputError(f"{path} is a LoRA adapter of {name}: {error}") from None
        tensors = merge_adapter(whisper_names(tensors), matrices, scale)
        source = path if (path / TOKENIZER).is_file() else source
        return config, tensors, generation, source
    if path.is_dir() and not (path / CONFIG).is_file():
        alone = sorted(path.glob("*.pt"))
        path = alone[0] if len(alone) == 1 else path
        if steps := [one.name for one in path.glob("checkpoint-*") if one.is_dir()]:
            raise InputError(
                f"{path} has no model and {', '.join(sorted(steps))}: name one of them"
            )
    if path.is_file():
        return *read_openai(path), {}, path.parent
    generation = _here_or_above(path, GENERATION)
    facts = read_json(generation) if generation.is_file() else {}
    config = HEADS | read_json(_here_or_above(path, CONFIG))
    return config, open_transformers(path), facts, path


def _here_or_above(folder: Path, name: str) -> Path:
    """A file of a folder, or where it is missing that of the folder above."""
    own, above = folder / name, folder.resolve().parent / name
    return above if above.is_file() and not own.is_file() else own


def _tokenizer_folder(folder: Path, dims: WhisperDims) -> Path:
    """The folder with the tokenizer of the model in `folder`: itself, the one above, or that of a
    fetched model with the same vocabulary."""
    if (path := _here_or_above(folder, TOKENIZER)).is_file():
        return path.parent
    fetched = model_folder(TOKENIZERS.get(dims.vocab, ""))
    if not (fetched / TOKENIZER).is_file():
        return folder
    log.info("%s has no tokenizer.json: that of %s is used", folder, fetched.name)
    return fetched


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that Transformers loads as it is: weights, configurations, tokenizer.

    The folder is replaced whole (`replacing`): a full disk or a kill never leaves old and new files
    mixed. Files in it that are not a model's stay. `dtype` is float32, float16 or bfloat16.

    Raises:
        InputError: the folder cannot be written.
    """
    with replacing(Path(folder), CONFIG, STALE) as complete:
        write_transformers(checkpoint, complete, dtype)


def write_transformers(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Write every file of the checkpoint into an empty folder."""
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    tensors = {name: tensor.astype(dtype, copy=False) for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    generation = checkpoint.generation
    config = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    config |= checkpoint.config | dims_to_hf(checkpoint.dims) | {"dtype": dtype}
    for key in ("torch_dtype", "forced_decoder_ids"):
        config.pop(key, None)
    for name, content in ((CONFIG, config), (GENERATION, generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes it private
    copy_processor(checkpoint.source, folder, checkpoint.dims)


@contextmanager
def replacing(folder: Path, key: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write a model into, whose files then replace those in `folder`.

    It lies beside `folder` until it is complete. Then `key`, the file without which no program
    takes the folder for a model, is removed first and comes last: whoever reads in between, or
    after a kill, finds no model, never new weights beside an old configuration. Other files in
    `folder` stay, but for those that match `stale`.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            complete = Path(beside) / "new"
            complete.mkdir()
            yield complete
            if not folder.exists():
                complete.rename(folder)
                return
            (folder / key).unlink(missing_ok=True)
            for file in [file for glob in stale for file in folder.glob(glob)]:
                file.unlink()
            for file in sorted(complete.iterdir(), key=lambda file: file.name == key):
                file.replace(folder / file.name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} could not be written: {error}") from error
