"""What Transformers keeps in `generation_config.json`, for checkpoints that come without one."""

from collections.abc import Sequence
from typing import Any

from flax_distil.errors import InputError
from flax_distil.model.dims import WhisperDims
from flax_distil.text.languages import LANGUAGES

BLANK = 220  # the token of one space, in both vocabularies
# Brackets, notes, quotes and the like: what Whisper was told never to write.
SYMBOLS_ENGLISH = [
    *(1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 357),
    *(366, 438, 532, 685, 705, 796, 930, 1058, 1220, 1267, 1279, 1303, 1343, 1377, 1391, 1635),
    *(1782, 1875, 2162, 2361, 2488, 3467, 4008, 4211, 4600, 4808, 5299, 5855, 6329, 7203, 9609),
    *(9959, 10563, 10786, 11420, 11709, 11907, 13163, 13697, 13700, 14808, 15306, 16410, 16791),
    *(17992, 19203, 19510, 20724, 22305, 22935, 27007, 30109, 30420, 33409, 34949, 40283, 40493),
    *(40549, 47282, 49146),
]
SYMBOLS_MULTILINGUAL = [
    *(1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 359),
    *(503, 522, 542, 873, 893, 902, 918, 922, 931, 1350, 1853, 1982, 2460, 2627, 3246, 3253, 3268),
    *(3536, 3846, 3961, 4183, 4667, 6585, 6647, 7273, 9061, 9383, 10428, 10929, 11938, 12033),
    *(12331, 12562, 13793, 14157, 14635, 15265, 15618, 16553, 16604, 18362, 18956, 20075, 21675),
    *(22520, 26130, 26161, 26435, 28279, 29464, 31650, 32302, 32470, 36865, 42863, 47425, 49870),
    50254,
]


def special_ids(dims: WhisperDims) -> dict[str, int]:
    """Whisper's special tokens by name; they follow the text tokens in a fixed order.

    Raises:
        InputError: the vocabulary is none of Whisper's three.
    """
    if not 51_864 <= dims.vocab <= 51_866:
        raise InputError(
            f"a vocabulary of {dims.vocab:,} tokens is none of Whisper's (51,864 to 51,866): "
            "use a Transformers folder, which says what its tokens are"
        )
    end = 50_257 if dims.multilingual else 50_256
    languages = list(LANGUAGES)[: 100 if dims.vocab == 51_866 else 99]
    tasks = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    names = ("endoftext", "startoftranscript", *languages, *tasks)
    return {name: end + i for i, name in enumerate(names)}


def token_ids(dims: WhisperDims) -> dict[str, Any]:
    """The token ids that `config.json` has beside the sizes."""
    ids = special_ids(dims)
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
) -> dict[str, Any]:
    """A complete `generation_config.json` of Whisper; what is not given is Whisper's own.

    Alignment heads that are not known are all heads of the upper half of the decoder, as
    openai-whisper takes them for a model that it does not know.
    """
    ids = special_ids(dims)
    symbols = SYMBOLS_MULTILINGUAL if dims.multilingual else SYMBOLS_ENGLISH
    never = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")
    upper_half = [
        [layer, head]
        for layer in range(dims.decoder_layers // 2, dims.decoder_layers)
        for head in range(dims.decoder_heads)
    ]
    config = token_ids(dims) | {
        "alignment_heads": [list(pair) for pair in alignment_heads or upper_half],
        "begin_suppress_tokens": list(suppress_first or (BLANK, ids["endoftext"])),
        "is_multilingual": dims.multilingual,
        "max_initial_timestamp_index": 50,  # one second
        "max_length": dims.text_positions,
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "return_timestamps": False,
        "suppress_tokens": list(suppress or symbols + [ids[name] for name in never]),
    }
    if not dims.multilingual:
        return config
    return config | {
        "lang_to_id": {f"<|{code}|>": ids[code] for code in LANGUAGES if code in ids},
        "task_to_id": {task: ids[task] for task in ("transcribe", "translate")},
    }
