"""The small files of a Transformers folder: tokenizer, spelling map, feature extractor."""

import json
import logging
import shutil
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from flax_distil.audio import SAMPLE_RATE
from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import (
    CHUNK_FRAMES,
    CHUNK_SAMPLES,
    CHUNK_SECONDS,
    HOP_LENGTH,
    WhisperDims,
)
from flax_distil.model.generation import special_ids
from flax_distil.text.tokens import TIMESTAMP_STEP, TIMESTAMPS, added_tokens

log = logging.getLogger(__name__)

FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "normalizer.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
FEATURES = {  # Transformers' WhisperFeatureExtractor
    "chunk_length": CHUNK_SECONDS,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "hop_length": HOP_LENGTH,
    "n_fft": 400,
    "n_samples": CHUNK_SAMPLES,
    "nb_max_frames": CHUNK_FRAMES,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": SAMPLE_RATE,
}
TIMES = [f"<|{step * TIMESTAMP_STEP:.2f}|>" for step in range(TIMESTAMPS)]  # 0.00 to 30.00 s


def copy_processor(source: Path, folder: Path, dims: WhisperDims) -> None:
    """Write the tokenizer and feature extractor of the model at `source` to `folder`.

    A Transformers folder's files are copied as they are; a folder that has only `tokenizer.json`,
    like CTranslate2's, gets the others made.

    If `source` has no tokenizer, as with an OpenAI `.pt`, a warning is logged.
    """
    found = [source / name for name in FILES if (source / name).is_file()]
    names = {path.name for path in found}
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if not names & {"tokenizer.json", "vocab.json"}:
        log.warning(
            "%s has no tokenizer.json, so the new model has none: add that of a Whisper with "
            "%d tokens to it",
            *(source, dims.vocab),
        )
    elif "tokenizer_config.json" not in names:
        write_tokenizer(source / "tokenizer.json", folder, dims)
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        text = json.dumps(FEATURES | {"feature_size": dims.mels}, indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def write_tokenizer(path: Path, folder: Path, dims: WhisperDims) -> None:
    """All tokenizer files that Transformers 4 and 5 read, from a bare `tokenizer.json`.

    The 1,501 timestamp tokens, which older files lack, are added. Spaces before punctuation stay
    (`clean_up_tokenization_spaces` false): Whisper writes them where it means them.

    Raises:
        InputError: the tokenizer's special tokens are not those of a model of these sizes.
    """
    tokenizer = read_json(path)
    tokens, ids = added_tokens(tokenizer, path), special_ids(dims)
    for name in ("endoftext", "startoftranscript", "notimestamps"):
        if tokens.get(f"<|{name}|>") != ids[name]:
            raise InputError(
                f"tokenizer.json has <|{name}|> at {tokens.get(f'<|{name}|>')}, a vocabulary of "
                f"{dims.vocab:,} needs it at {ids[name]}: it belongs to another model"
            )
    # Not special: Transformers takes the last special token + 1 for the first timestamp.
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    added = tokenizer["added_tokens"] + [
        {"id": id, "content": time, "normalized": True, **plain}
        for id, time in enumerate(TIMES, ids["notimestamps"] + 1)
        if time not in tokens
    ]
    added.sort(key=lambda token: token["id"])
    config = dict.fromkeys(
        ("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"
    ) | {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            token["id"]: {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
        "additional_special_tokens": [token["content"] for token in added if token["special"]],
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 1024,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "tokenizer_class": "WhisperTokenizer",
    }
    whole = tokenizer | {"added_tokens": added}
    for name, content in {
        "tokenizer.json": whole,
        "tokenizer_config.json": config,
        # whisper.cpp's converter reads it.
        "added_tokens.json": {token["content"]: token["id"] for token in added},
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    Tokenizer.from_file(str(path)).model.save(str(folder))  # vocab.json, merges.txt
    spellings = files("whisper_normalizer") / "normalizers" / "english.json"
    (folder / "normalizer.json").write_bytes(spellings.read_bytes())
