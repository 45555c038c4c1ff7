"""The `generation_config.json` of Whisper: made for checkpoints that have none, or completed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import CHUNK_SECONDS, POSITIONS_PER_SECOND, WhisperDims
from flax_distil.text.languages import LANGUAGES
from flax_distil.text.tokens import BLANK, ENGLISH_END, added_tokens, suppressed_ids

VOCABULARIES = range(51_864, 51_867)  # sizes of vocabularies: English-only, multilingual, large-v3
TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
WHOLE_WINDOW = POSITIONS_PER_SECOND * CHUNK_SECONDS  # 1,500 audio positions
SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
TYPES = {
    "alignment_heads": list, "audio_context": list,
    "lang_to_id": dict, "task_to_id": dict, "language": str, "task": str,
}  # fmt: skip
# With _from_model_config Transformers would make it anew out of config.json, tables lost.
OUTDATED = ("forced_decoder_ids", "_from_model_config")


def special_ids(dims: WhisperDims, folder: Path | None = None) -> dict[str, int]:
    """Whisper's special tokens by name, as the folder's tokenizer.json has them.

    Without one they follow the text tokens in a fixed order, which the vocabulary's size decides.

    Raises:
        InputError: the tokenizer is not Whisper's, or there is none and the vocabulary is not one
            of Whisper's three.
    """
    if folder is not None and (path := folder / "tokenizer.json").is_file():
        ids = {token.strip("<|>"): id for token, id in added_tokens(read_json(path), path).items()}
        ids.setdefault("nospeech", ids.get("nocaptions", -1))  # what older checkpoints call it
        for name in ("endoftext", "startoftranscript", *TASKS):
            if ids.get(name, -1) < 0:
                raise InputError(f"{path} has no token <|{name}|>: it is not a Whisper tokenizer")
        return ids
    if dims.vocab not in VOCABULARIES:
        raise InputError(
            f"a vocabulary of {dims.vocab:,} tokens is none of Whisper's (51,864 to 51,866) and "
            "there is no tokenizer.json that says what its tokens are: add the model's"
        )
    end = 50_257 if dims.multilingual else 50_256
    languages = list(LANGUAGES)[: 100 if dims.vocab == 51_866 else 99]
    names = ("endoftext", "startoftranscript", *languages, *TASKS)
    return {name: end + i for i, name in enumerate(names)}


def generation_config(dims: WhisperDims, ids: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A complete `generation_config.json` of Whisper. ids: those of `special_ids`.

    Alignment heads are all heads of the upper half of the decoder, as openai-whisper takes them for
    a model that it does not know.
    """
    ids = ids or special_ids(dims)
    config: dict[str, Any] = {
        "alignment_heads": upper_half(dims),
        "begin_suppress_tokens": [BLANK, ids["endoftext"]],
        "bos_token_id": ids["endoftext"],
        "decoder_start_token_id": ids["startoftranscript"],
        "eos_token_id": ids["endoftext"],
        "is_multilingual": ids["endoftext"] != ENGLISH_END,
        "max_initial_timestamp_index": 50,  # one second
        "max_length": dims.text_positions,
        "no_timestamps_token_id": ids["notimestamps"],
        "pad_token_id": ids["endoftext"],
        "prev_sot_token_id": ids["startofprev"],
        "return_timestamps": False,
        "suppress_tokens": suppressed_ids(ids),
    }
    if config["is_multilingual"]:
        config["lang_to_id"] = {f"<|{code}|>": ids[code] for code in LANGUAGES if code in ids}
        config["task_to_id"] = {task: ids[task] for task in ("transcribe", "translate")}
    return config


def completed(
    generation: Mapping[str, Any], config: Mapping[str, Any], dims: WhisperDims, folder: Path
) -> dict[str, Any]:
    """A `generation_config.json` with missing keys added and keys that do not apply removed.

    Those of 2022 have no tables of languages and tasks, without which Transformers refuses
    `language` and timestamps. Their `forced_decoder_ids` go: they were copied from model to model,
    whatever its language. Heads of layers that only a teacher has are left out.

    generation: empty without such a file. config: `config.json`, where older checkpoints
    keep the suppressed tokens.

    Raises:
        InputError: a value has another type than in Whisper's.
    """
    own = {key: config.get(key) for key in SUPPRESSED} | {
        key: [] if value is None and key in SUPPRESSED else value
        for key, value in generation.items()
        if key not in OUTDATED
    }
    own = {key: value for key, value in own.items() if value is not None}
    wrong = [key for key in SUPPRESSED if not _are_numbers(own.get(key, []))]
    wrong += [key for key, kind in TYPES.items() if not isinstance(own.get(key, kind()), kind)]
    if not wrong and not all(_are_numbers(pair, 2) for pair in own.get("alignment_heads", [])):
        wrong = ["alignment_heads"]
    if wrong:
        raise InputError(
            f"the generation config has {wrong[0]} {str(own[wrong[0]])[:40]!r}, which is of "
            "another type than Whisper's: fetch it again"
        )
    heads = kept_heads(own.pop("alignment_heads", None), dims)
    if heads is not None:
        own["alignment_heads"] = heads
    if generation and not (dims.vocab in VOCABULARIES or (folder / "tokenizer.json").is_file()):
        return {"alignment_heads": upper_half(dims)} | own  # ids unknown
    return generation_config(dims, special_ids(dims, folder)) | own


def _are_numbers(value: Any, count: int | None = None) -> bool:
    numbers = isinstance(value, list | tuple) and all(type(one) is int for one in value)
    return numbers and count in (None, len(value))


def kept_heads(heads: Sequence[Sequence[int]] | None, dims: WhisperDims) -> list[list[int]] | None:
    """Those [layer, head] that the model has; None where none are known."""
    kept = [
        [layer, head]
        for layer, head in heads or ()
        if 0 <= layer < dims.decoder_layers and 0 <= head < dims.decoder_heads
    ]
    return kept if kept or heads == [] else None


def upper_half(dims: WhisperDims) -> list[list[int]]:
    """All [layer, head] of the upper half of the decoder."""
    layers = range(dims.decoder_layers // 2, dims.decoder_layers)
    return [[layer, head] for layer in layers for head in range(dims.decoder_heads)]


def context_positions(seconds: Sequence[Any]) -> tuple[int, ...]:
    """Audio positions of contexts shorter than 30 s, ascending.

    Raises:
        InputError: a context is not above 0 and at most 30 s.
    """
    for one in seconds:
        if not (isinstance(one, int | float) and 0 < one <= CHUNK_SECONDS):
            raise InputError(
                f"an audio context of {one} s: it must be above 0 and at most {CHUNK_SECONDS} s"
            )
    positions = {round(POSITIONS_PER_SECOND * one) for one in seconds}
    return tuple(sorted(positions - {0, WHOLE_WINDOW}))


def fitting_context(contexts: Sequence[int], positions: int) -> int:
    """The shortest of `contexts`, in ascending order, that holds `positions`, else the window."""
    return next((context for context in contexts if positions <= context), WHOLE_WINDOW)
