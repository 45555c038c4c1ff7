"""What Transformers keeps in `generation_config.json`, for checkpoints that come without one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import WhisperDims
from flax_distil.text.languages import LANGUAGES
from flax_distil.text.tokens import BLANK, ENGLISH_END, added_tokens, suppressed_ids

VOCABULARIES = range(51_864, 51_867)  # sizes of vocabularies: English-only, multilingual, large-v3
TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def special_ids(dims: WhisperDims, folder: Path | None = None) -> dict[str, int]:
    """Whisper's special tokens by name, as the folder's tokenizer.json has them.

    Without one they follow the text tokens in a fixed order, which the vocabulary's size decides.

    Raises:
        InputError: there is no tokenizer, and the vocabulary is not one of Whisper's three.
    """
    if folder is not None and (folder / "tokenizer.json").is_file():
        return _named_ids(folder / "tokenizer.json")
    if dims.vocab not in VOCABULARIES:
        raise InputError(
            f"a vocabulary of {dims.vocab:,} tokens is none of Whisper's (51,864 to 51,866) and "
            "there is no tokenizer.json that says what its tokens are: add the model's"
        )
    end = 50_257 if dims.multilingual else 50_256
    languages = list(LANGUAGES)[: 100 if dims.vocab == 51_866 else 99]
    names = ("endoftext", "startoftranscript", *languages, *TASKS)
    return {name: end + i for i, name in enumerate(names)}


def _named_ids(path: Path) -> dict[str, int]:
    ids = {token.strip("<|>"): id for token, id in added_tokens(read_json(path), path).items()}
    ids.setdefault("nospeech", ids.get("nocaptions", -1))  # what older checkpoints call it
    missing = [name for name in ("endoftext", "startoftranscript", *TASKS) if ids.get(name, -1) < 0]
    if missing:
        raise InputError(f"{path} has no token <|{missing[0]}|>: it is not a Whisper tokenizer")
    return ids


def token_ids(dims: WhisperDims, ids: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The token ids that `config.json` has beside the sizes. ids: those of `special_ids`."""
    ids = ids or special_ids(dims)
    return {
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["endoftext"],
        "pad_token_id": ids["endoftext"],
        "decoder_start_token_id": ids["startoftranscript"],
    }


def generation_config(
    dims: WhisperDims,
    suppress: Sequence[int] | None = None,
    suppress_first: Sequence[int] | None = None,
    alignment_heads: Sequence[Sequence[int]] | None = None,
    ids: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A complete `generation_config.json` of Whisper; what is None is Whisper's own.

    Alignment heads that are not known are all heads of the upper half of the decoder, as
    openai-whisper takes them for a model that it does not know. ids: those of `special_ids`.
    """
    ids = ids or special_ids(dims)
    multilingual = ids["endoftext"] != ENGLISH_END
    if suppress is None:
        suppress = suppressed_ids(ids)
    if suppress_first is None:
        suppress_first = (BLANK, ids["endoftext"])
    if alignment_heads is None:
        alignment_heads = upper_half(dims)
    config = token_ids(dims, ids) | {
        "alignment_heads": [list(pair) for pair in alignment_heads],
        "begin_suppress_tokens": list(suppress_first),
        "is_multilingual": multilingual,
        "max_initial_timestamp_index": 50,  # one second
        "max_length": dims.text_positions,
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "return_timestamps": False,
        "suppress_tokens": list(suppress),
    }
    if not multilingual:
        return config
    return config | {
        "lang_to_id": {f"<|{code}|>": ids[code] for code in LANGUAGES if code in ids},
        "task_to_id": {task: ids[task] for task in ("transcribe", "translate")},
    }


def completed(
    generation: Mapping[str, Any], config: Mapping[str, Any], dims: WhisperDims, folder: Path
) -> dict[str, Any]:
    """A `generation_config.json` with what it lacks and without what the model cannot follow.

    Those of 2022 have no tables of languages and tasks, without which Transformers refuses
    `language` and timestamps. Their `forced_decoder_ids` go: they were copied from model to model,
    whatever its language. Heads of layers that only a teacher has are left out.

    generation: empty without such a file. config: `config.json`, where older checkpoints
    keep the suppressed tokens.

    Raises:
        InputError: a list does not hold whole numbers, or pairs of them.
    """
    suppressed = {}
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        source = generation if key in generation else config
        suppressed[key] = _numbers(source.get(key), key)
    heads = kept_heads(generation.get("alignment_heads"), dims)
    if generation and not (dims.vocab in VOCABULARIES or (folder / "tokenizer.json").is_file()):
        whole = {"alignment_heads": upper_half(dims) if heads is None else heads}  # ids unknown
    else:
        ids = special_ids(dims, folder)
        whole = generation_config(
            dims, suppressed["suppress_tokens"], suppressed["begin_suppress_tokens"], heads, ids
        )
    own = {key: value for key, value in generation.items() if value is not None}
    own |= {key: [] for key in suppressed if key in generation and generation[key] is None}
    for key, kind in (("lang_to_id", dict), ("task_to_id", dict), ("language", str), ("task", str)):
        if key in own and not isinstance(own[key], kind):
            raise InputError(
                f"generation_config.json has {key} {str(own[key])[:40]!r}: a {kind.__name__} is "
                "needed, fetch it again"
            )
    # With _from_model_config Transformers would make it anew out of config.json, tables lost.
    for key in ("forced_decoder_ids", "alignment_heads", "_from_model_config"):
        own.pop(key, None)
    return whole | own


def kept_heads(heads: Any, dims: WhisperDims) -> list[list[int]] | None:
    """Those [layer, head] that the model has; None where none are known.

    Raises:
        InputError: they are not pairs of whole numbers.
    """
    if heads is None:
        return None
    if not isinstance(heads, list) or not all(
        isinstance(pair, list | tuple) and len(_numbers(pair, "alignment_heads") or ()) == 2
        for pair in heads
    ):
        raise InputError(
            f"alignment_heads {str(heads)[:40]} are not [layer, head] pairs: remove them from the "
            "configuration, or choose them with `flax-distil export --heads-of`"
        )
    kept = [
        [layer, head]
        for layer, head in heads
        if 0 <= layer < dims.decoder_layers and 0 <= head < dims.decoder_heads
    ]
    return kept if kept or not heads else None


def _numbers(value: Any, key: str) -> list[int] | None:
    """A list of whole numbers, or None. Raises InputError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or any(type(one) is not int for one in value):
        raise InputError(
            f"{key} {str(value)[:40]!r} is not a list of whole numbers: fetch it again"
        )
    return list(value)


def upper_half(dims: WhisperDims) -> list[list[int]]:
    """All [layer, head] of the upper half of the decoder."""
    layers = range(dims.decoder_layers // 2, dims.decoder_layers)
    return [[layer, head] for layer in layers for head in range(dims.decoder_heads)]
