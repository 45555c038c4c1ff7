"""The small files of a Transformers folder: tokenizer, spelling map, feature extractor."""

import json
import logging
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import (
    CHUNK_FRAMES,
    CHUNK_SAMPLES,
    CHUNK_SECONDS,
    HOP_LENGTH,
    SAMPLE_RATE,
    WhisperDims,
)
from flax_distil.model.generation import special_ids
from flax_distil.text.tokens import TIMESTAMP_STEP, TIMESTAMPS

log = logging.getLogger(__name__)

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
TIMES = [f"<|{step * TIMESTAMP_STEP:.2f}|>" for step in range(TIMESTAMPS)]  # 0.00 to 30.00 s


def copy_processor(source: Path, folder: Path, dims: WhisperDims) -> None:
    """Put the tokenizer and feature extractor of the model at `source` into `folder`.

    A Transformers folder's files are copied as they are; a folder that has only `tokenizer.json`,
    like CTranslate2's, gets the others made.

    Where `source` has no tokenizer, as beside an OpenAI `.pt`, a warning says so.
    """
    found = [source / name for name in FILES if (source / name).is_file()]
    names = {path.name for path in found}
    for path in found if source.resolve() != folder.resolve() else ():
        shutil.copyfile(path, folder / path.name)
    made = {}
    if not names & {"tokenizer.json", "vocab.json"}:
        log.warning(
            "%s has no tokenizer.json: add the one of a Whisper with %d tokens to use %s",
            *(source, dims.vocab, folder.name),
        )
    elif "tokenizer_config.json" not in names:
        made |= tokenizer_files(read_json(source / "tokenizer.json"), dims)
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        made["preprocessor_config.json"] = feature_extractor_config(dims)
    for name, content in made.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")


def tokenizer_files(tokenizer: dict[str, Any], dims: WhisperDims) -> dict[str, Any]:
    """All tokenizer files of Transformers, from a bare `tokenizer.json`: file name -> content.

    The 1,501 timestamp tokens, which older files lack, are added. Spaces before punctuation stay
    (`clean_up_tokenization_spaces` false): Whisper writes them where it means them.

    Raises:
        InputError: the tokenizer's special tokens are not those of a model of these sizes.
    """
    tokens = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = special_ids(dims)
    for name in ("endoftext", "startoftranscript", "notimestamps"):
        if tokens.get(f"<|{name}|>") != ids[name]:
            raise InputError(
                f"tokenizer.json has <|{name}|> at {tokens.get(f'<|{name}|>')}, a vocabulary of "
                f"{dims.vocab:,} needs it at {ids[name]}: it belongs to another model"
            )
    shape = {"single_word": False, "lstrip": False, "rstrip": False}
    # Not special: Transformers takes the last special token + 1 for the first timestamp.
    missing = [
        {"id": ids["notimestamps"] + 1 + step, "content": token, **shape}
        | {"normalized": True, "special": False}
        for step, token in enumerate(TIMES)
        if token not in tokens
    ]
    added = sorted(tokenizer["added_tokens"] + missing, key=lambda token: token["id"])
    special = [token["content"] for token in added if token["special"]]
    end = "<|endoftext|>"
    roles = {"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": end}
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
    ]
    return {
        "tokenizer.json": tokenizer | {"added_tokens": added},
        "vocab.json": tokenizer["model"]["vocab"],
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "added_tokens.json": {token["content"]: token["id"] for token in added},
        "special_tokens_map.json": roles | {"additional_special_tokens": special},
        "normalizer.json": spelling_map(),
        "tokenizer_config.json": roles
        | {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in added
            },
            "additional_special_tokens": special,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "processor_class": "WhisperProcessor",
            "return_attention_mask": False,
            "tokenizer_class": "WhisperTokenizer",
        },
    }


def feature_extractor_config(dims: WhisperDims) -> dict[str, Any]:
    """The `preprocessor_config.json` of a Whisper with these sizes."""
    return {
        "chunk_length": CHUNK_SECONDS,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": dims.mels,
        "hop_length": HOP_LENGTH,
        "n_fft": 400,
        "n_samples": CHUNK_SAMPLES,
        "nb_max_frames": CHUNK_FRAMES,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": SAMPLE_RATE,
    }


def spelling_map() -> dict[str, str]:
    """British to American spellings, of Whisper's English normaliser."""
    path = files("whisper_normalizer") / "normalizers" / "english.json"
    return json.loads(path.read_text(encoding="utf-8"))
