"""A model to the folders that Transformers, openai-whisper and faster-whisper load as they are."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from flax_distil.config import ExportConfig
from flax_distil.errors import InputError, check_writable
from flax_distil.export.card import model_card
from flax_distil.export.heads import with_heads_of
from flax_distil.export.source import read_source
from flax_distil.export.verify import import_torch, largest_difference
from flax_distil.model.checkpoint import STALE, Checkpoint, write_transformers
from flax_distil.model.ctranslate2 import write_ctranslate2
from flax_distil.model.folder import replacing
from flax_distil.model.openai import to_openai
from flax_distil.model.processor import copy_processor
from flax_distil.model.weights import to_hf
from flax_distil.text.tokens import load_tokens

log = logging.getLogger(__name__)

WEIGHTS = {
    "transformers": "model.safetensors",
    "openai": "model.pt",
    "ctranslate2": "model.bin",
}
KEYS = WEIGHTS | {"transformers": "config.json"}  # without which a folder is no model


def run(config: ExportConfig) -> dict[str, Path]:
    """Write `config.source` in every format asked for; returns format → folder.

    Raises:
        InputError: the source or the report cannot be read, PyTorch is needed and missing, a folder
            cannot be written or holds another format, or the export differs from our model by more
            than `config.tolerance`.
    """
    folders = folders_of(config)
    if config.verify:
        if "transformers" not in folders:
            raise InputError("verify compares with PyTorch: add transformers to the formats")
        import_torch("to verify")
    elif config.verify_audio:
        raise InputError("verify_audio is the clip that verify hears: add --verify")
    if (config.heads_of is None) != (config.heads_on is None):
        raise InputError("heads_of and heads_on belong together: a teacher, and speech to hear")
    checkpoint = read_source(config.source, config.checkpoint)
    if config.heads_of and config.heads_on:
        checkpoint = with_heads_of(checkpoint, config.heads_of, config.heads_on)
    cards = {name: model_card(checkpoint, config, name, folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        with replacing(folder, KEYS[name], STALE) as complete:
            WRITERS[name](checkpoint, complete, config.dtype)
            (complete / "README.md").write_text(cards[name], encoding="utf-8")
        log.info("%s: %s", name, folder)
    if config.verify:
        difference = largest_difference(folders["transformers"], config.verify_audio)
        if not difference <= config.tolerance:
            raise InputError(
                f"the logits of {folders['transformers']} in PyTorch differ from ours by "
                f"{difference:.2g}, over {config.tolerance:.2g}: do not use this export"
            )
        log.info("logits in PyTorch differ from ours by at most %.2g", difference)
    return folders


def folders_of(config: ExportConfig) -> dict[str, Path]:
    """Where each format goes.

    Raises:
        InputError: there is none, or a folder cannot be written or holds another format, whose
            configuration would be lost or whose weights would be read in place of the new ones.
    """
    if not config.format:
        raise InputError(f"name at least one format: {', '.join(WRITERS)}")
    check_writable(config.output_dir)
    several = len(set(config.format)) > 1
    folders = {
        name: config.output_dir / name if several else config.output_dir for name in config.format
    }
    for name, folder in folders.items():
        for other, weights in WEIGHTS.items():
            if other != name and (folder / weights).exists():
                raise InputError(
                    f"{folder} holds {weights}, a model in the format {other}: "
                    f"write the {name} one to another --output-dir"
                )
    return folders


def write_openai(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """`model.pt` for `whisper.load_model`, and beside it the tokenizer, which others need."""
    torch = import_torch("an OpenAI .pt")
    checkpoint = whispers_own(checkpoint)
    sizes, state = to_openai(checkpoint.dims, to_hf(checkpoint.dims, checkpoint.params))
    tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in state.items()}
    torch.save({"dims": sizes, "model_state_dict": tensors}, folder / "model.pt")
    copy_processor(checkpoint.source, folder, checkpoint.dims)


def write_faster_whisper(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """CTranslate2's folder with the tokenizer beside it, as `faster_whisper.WhisperModel` wants."""
    checkpoint = whispers_own(checkpoint)
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    write_ctranslate2(folder, checkpoint.dims, tensors, checkpoint.generation, dtype)
    copy_processor(checkpoint.source, folder, checkpoint.dims)
    names = json.dumps(token_names(folder, checkpoint.dims.vocab), ensure_ascii=False)
    (folder / "vocabulary.json").write_text(names, encoding="utf-8")


def whispers_own(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the padding of its vocabulary, where its tokenizer is known.

    Raises:
        InputError: it has added words, which openai-whisper and CTranslate2 would take for times.
    """
    if not (checkpoint.source / "tokenizer.json").is_file():
        return checkpoint
    tokens = checkpoint.tokens()
    if tokens.words:
        raise InputError(
            f"the vocabulary has {len(tokens.words)} added tokens behind <|30.00|>, which "
            "openai-whisper and CTranslate2 take for times: export to transformers alone"
        )
    decoder = checkpoint.params["decoder"]
    embedding = {"embedding": decoder["tokens"]["embedding"][: tokens.vocabulary]}
    return replace(
        checkpoint,
        dims=replace(checkpoint.dims, vocab=tokens.vocabulary),
        params=checkpoint.params | {"decoder": decoder | {"tokens": embedding}},
    )


def token_names(folder: Path, size: int) -> list[str]:
    """What CTranslate2 calls each id; times that a tokenizer.json leaves out are filled in.

    Raises:
        InputError: the folder has no tokenizer.json, or it is not Whisper's.
    """
    tokens = load_tokens(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    names = {id: name for name, id in vocabulary.items()}
    for id in range(tokens.timestamp_begin, size):
        names.setdefault(id, f"<|{tokens.seconds(id):.2f}|>")
    return [names[id] for id in range(size)]


WRITERS: dict[str, Callable[[Checkpoint, Path, str], None]] = {
    "transformers": write_transformers,
    "openai": write_openai,
    "ctranslate2": write_faster_whisper,
}
