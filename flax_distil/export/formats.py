"""Export to folders that Transformers, openai-whisper and faster-whisper load unchanged."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.config import ExportConfig
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.distill.runs import is_run, trained_student
from flax_distil.errors import InputError, check_writable
from flax_distil.export.card import model_card
from flax_distil.export.verify import largest_difference
from flax_distil.model.checkpoint import (
    STALE,
    Checkpoint,
    load_checkpoint,
    replacing,
    write_transformers,
)
from flax_distil.model.ctranslate2 import write_ctranslate2
from flax_distil.model.processor import copy_processor
from flax_distil.model.tensors import import_torch, to_openai
from flax_distil.model.weights import to_hf
from flax_distil.text.tokens import load_tokens
from flax_distil.transcription.alignment import heads_like

log = logging.getLogger(__name__)

ALIGNED_CLIPS = 16  # whose attention chooses the alignment heads
# Files without which a folder is not a model: removed first and written last.
KEYS = {"transformers": "config.json", "openai": "model.pt", "ctranslate2": "model.bin"}
WEIGHTS = KEYS | {"transformers": "model.safetensors"}


def run(config: ExportConfig) -> dict[str, Path]:
    """Write `config.source` in every format of the config; returns format → folder.

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
        raise InputError("--verify-audio has no effect alone: add --verify")
    if (config.heads_of is None) != (config.heads_on is None):
        raise InputError("heads_of (a teacher) and heads_on (speech) belong together: give both")
    source = Path(config.source).expanduser()
    if is_run(source):
        step, checkpoint = trained_student(source, config.checkpoint)
        log.info("%s: the student of step %d", source, step)
    else:
        checkpoint = load_checkpoint(config.source)
    if config.heads_of and config.heads_on:
        checkpoint = with_heads_of(checkpoint, config.heads_of, config.heads_on)
    cards = {name: model_card(checkpoint, config, name, folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        with replacing(folder, KEYS[name], STALE) as complete:
            WRITERS[name](checkpoint, complete, config.dtype)
            (complete / "README.md").write_text(cards[name], encoding="utf-8")
        log.info("wrote %s to %s", name, folder)
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
    """Format → folder.

    Raises:
        InputError: there is no format, or a folder cannot be written or holds another format, whose
            configuration would be lost or whose weights would be read instead of the new ones.
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
                    f"{folder} holds {weights}, a model in {other} format: "
                    f"choose another --output-dir for {name}"
                )
    return folders


def with_heads_of(checkpoint: Checkpoint, teacher: str, speech: str) -> Checkpoint:
    """The checkpoint with the heads that align the first clips of a dataset as the teacher's do.

    Raises:
        InputError: one of the two cannot be read, there is no clip, or the tokenizers differ.
    """
    guide = load_checkpoint(teacher)
    if guide.dims.vocab != checkpoint.dims.vocab:
        raise InputError(
            f"{teacher} has {guide.dims.vocab:,} tokens and the student {checkpoint.dims.vocab:,}: "
            "choose a teacher with the same tokenizer"
        )
    clips = islice(read_dataset(speech).iter_from(0), ALIGNED_CLIPS)
    waveforms = [load_waveform(clip) for clip in clips]
    if not waveforms:
        raise InputError(f"{speech} has no clip to choose alignment heads on")
    heads = heads_like(
        make_recognizer(checkpoint),
        make_recognizer(guide),
        np.stack([pad_or_trim(waveform) for waveform in waveforms]),
        [waveform.size / SAMPLE_RATE for waveform in waveforms],
    )
    log.info("alignment heads (layer, head): %s", ", ".join(map(str, heads)))
    generation = checkpoint.generation | {"alignment_heads": [list(head) for head in heads]}
    return replace(checkpoint, generation=generation)


def write_openai(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """`model.pt` for `whisper.load_model`, with the tokenizer for other libraries."""
    torch = import_torch("an OpenAI .pt")
    checkpoint = without_padding(checkpoint)
    sizes, state = to_openai(checkpoint.dims, to_hf(checkpoint.dims, checkpoint.params))
    tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in state.items()}
    torch.save({"dims": sizes, "model_state_dict": tensors}, folder / "model.pt")
    copy_processor(checkpoint.source, folder, checkpoint.dims)


def write_faster_whisper(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """CTranslate2's folder with the tokenizer, for `faster_whisper.WhisperModel`.

    Raises:
        InputError: the checkpoint has no tokenizer.json of Whisper.
    """
    checkpoint = without_padding(checkpoint)
    tensors = to_hf(checkpoint.dims, checkpoint.params)
    write_ctranslate2(folder, checkpoint.dims, tensors, checkpoint.generation, dtype)
    copy_processor(checkpoint.source, folder, checkpoint.dims)
    tokens = load_tokens(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    names = {id: name for name, id in vocabulary.items()}
    for id in range(tokens.timestamp_begin, checkpoint.dims.vocab):  # that older files lack
        names.setdefault(id, f"<|{tokens.seconds(id):.2f}|>")
    text = json.dumps([names[id] for id in range(checkpoint.dims.vocab)], ensure_ascii=False)
    (folder / "vocabulary.json").write_text(text, encoding="utf-8")


def without_padding(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the padding of its vocabulary, if it has a tokenizer.

    Raises:
        InputError: it has added tokens, which openai-whisper and CTranslate2 would read as
            timestamps, or which of its tokens are padding is not known.
    """
    if not (checkpoint.source / "tokenizer.json").is_file():
        english = checkpoint.generation.get("is_multilingual") is False
        if english and checkpoint.dims.multilingual:
            raise InputError(
                f"an English-only model has {checkpoint.dims.vocab:,} tokens, with which "
                f"openai-whisper takes it for multilingual, and {checkpoint.source} has no "
                "tokenizer.json that says which are padding: add the model's"
            )
        return checkpoint
    tokens = checkpoint.tokens()
    if tokens.words:
        raise InputError(
            f"the vocabulary has {len(tokens.words)} added tokens behind <|30.00|>, which "
            "openai-whisper and CTranslate2 read as timestamps: export to transformers alone"
        )
    decoder = checkpoint.params["decoder"]
    embedding = {"embedding": decoder["tokens"]["embedding"][: tokens.vocabulary]}
    return replace(
        checkpoint,
        dims=replace(checkpoint.dims, vocab=tokens.vocabulary),
        params=checkpoint.params | {"decoder": decoder | {"tokens": embedding}},
    )


WRITERS: dict[str, Callable[[Checkpoint, Path, str], None]] = {
    "transformers": write_transformers,
    "openai": write_openai,
    "ctranslate2": write_faster_whisper,
}
