"""Whisper's token ids: special tokens, prompts, text to ids and back.

A tokenizer file is read as a byte-pair encoding and a separate table of special tokens. So a
transcript that contains "<|endoftext|>" is encoded as thirteen characters, and timestamps exist
even where the file leaves them out, as that of tiny.en does.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, SupportsIndex

from tokenizers import AddedToken, Tokenizer

from flax_distil.errors import InputError, read_json
from flax_distil.text.languages import LANGUAGES, to_language_code

TIMESTAMPS = 1501  # <|0.00|> … <|30.00|>
TIMESTAMP_STEP = 0.02  # seconds between two of them
ENGLISH_END = 50_256  # <|endoftext|> of English-only checkpoints, which keep GPT-2's vocabulary
BLANK = 220  # the token of one space, in both vocabularies

# Tokens that Whisper must not generate: brackets, music signs, speaker tags; control tokens.
SYMBOLS_ENGLISH = """
1 2 7 8 9 10 14 25 26 27 28 29 31 58 59 60 61 62 63 90 91 92 93 357 366 438 532 685 705 796 930 1058
1220 1267 1279 1303 1343 1377 1391 1635 1782 1875 2162 2361 2488 3467 4008 4211 4600 4808 5299 5855
6329 7203 9609 9959 10563 10786 11420 11709 11907 13163 13697 13700 14808 15306 16410 16791 17992
19203 19510 20724 22305 22935 27007 30109 30420 33409 34949 40283 40493 40549 47282 49146
"""
SYMBOLS_MULTILINGUAL = """
1 2 7 8 9 10 14 25 26 27 28 29 31 58 59 60 61 62 63 90 91 92 93 359 503 522 542 873 893 902 918 922
931 1350 1853 1982 2460 2627 3246 3253 3268 3536 3846 3961 4183 4667 6585 6647 7273 9061 9383 10428
10929 11938 12033 12331 12562 13793 14157 14635 15265 15618 16553 16604 18362 18956 20075 21675
22520 26130 26161 26435 28279 29464 31650 32302 32470 36865 42863 47425 49870 50254
"""
CONTROLS = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech")

# Special tokens that are written out in texts, such as <|0.00|> or <|endoftext|>.
WRITTEN = re.compile(r"<\|([^<>|\s]{1,40})\|>")
SECONDS = re.compile(r"\d{1,2}\.\d{1,2}")


@dataclass(frozen=True, eq=False)
class WhisperTokens:
    """The vocabulary of one Whisper checkpoint.

    Ids from `eot` to the timestamp of 30 s are special. Words added by a fine-tuned checkpoint and
    padding of the embedding may follow.
    """

    bpe: Tokenizer = field(repr=False)
    eot: int
    sot: int
    transcribe: int
    translate: int
    previous: int  # precedes the text of the previous segment
    no_speech: int
    no_timestamps: int
    multilingual: bool
    languages: dict[str, int] = field(repr=False)  # code → id; empty when English-only
    suppressed: tuple[int, ...] = field(repr=False)  # never generated
    suppressed_first: tuple[int, ...]  # not generated as the first token
    words: dict[int, str] = field(default_factory=dict, repr=False)  # added; "" where special
    word_ids: dict[int, int] = field(default_factory=dict, repr=False)  # id in `bpe` → id here
    padding: tuple[int, ...] = field(default=(), repr=False)  # ids of the model without a token

    @property
    def timestamp_begin(self) -> int:
        """The id of `<|0.00|>`; the other timestamps follow, up to 30 s."""
        return self.no_timestamps + 1

    @property
    def times(self) -> range:
        """The ids of the timestamps. `id in times` is only fast for a Python `int`."""
        return range(self.timestamp_begin, self.timestamp_begin + TIMESTAMPS)

    @property
    def vocabulary(self) -> int:
        """Number of ids with timestamps and added words: 51864 to 51866 in published
        checkpoints."""
        return max(self.words, default=self.times.stop - 1) + 1

    def is_text(self, token: int) -> bool:
        """Whether a token is text, neither a control token nor a timestamp."""
        return token < self.eot or token in self.words

    def prompt(
        self,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        previous: Sequence[int] = (),
    ) -> list[int]:
        """The decoder's prompt: `[previous …] sot [language task] [no_timestamps]`.

        Language and task are only in the prompt of a multilingual checkpoint. previous: ids of the
        text before, as many as the caller has room for.

        Raises:
            InputError: the checkpoint lacks the language or task, or the language is missing.
        """
        start = [self.previous, *previous, self.sot] if previous else [self.sot]
        return start + self._language_task(language, task) + [self.no_timestamps] * (not timestamps)

    def _language_task(self, language: str | None, task: str) -> list[int]:
        if task not in ("transcribe", "translate"):
            raise InputError(f'no task "{task}": use "transcribe" or "translate"')
        code = None if language is None else to_language_code(language)
        if not self.multilingual:
            if code not in (None, "en") or task == "translate":
                raise InputError(
                    f"an English-only checkpoint cannot {task} {LANGUAGES[code or 'en']}: "
                    "use a multilingual one"
                )
            return []
        if code is None:
            raise InputError("a multilingual checkpoint needs a language: name it or detect it")
        if code not in self.languages:
            raise InputError(
                f"this checkpoint has {len(self.languages)} languages and {LANGUAGES[code]} is not "
                "among them: use large-v3 or a model made from it"
            )
        return [self.languages[code], self.translate if task == "translate" else self.transcribe]

    def unsupported(self, language: str | None, task: str = "transcribe") -> str | None:
        """Why the checkpoint cannot transcribe a language; None where it can, or can detect it."""
        try:
            self._language_task(language or ("en" if self.multilingual else None), task)
        except InputError as error:
            return str(error)
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of text; special tokens written in it are encoded as characters.

        Lone surrogates, as Python reads bytes of a command line that are not UTF-8, are left out.
        """
        whole = text.encode("utf-8", "ignore").decode("utf-8")
        ids = self.bpe.encode(whole, add_special_tokens=False).ids
        return [self.word_ids.get(token, token) for token in ids]

    def decode(self, ids: Iterable[SupportsIndex], timestamps: bool = False) -> str:
        """Text of ids without special tokens; `timestamps` writes these as `<|1.08|>`."""

        def written(token: int) -> str | None:
            """The text of an id that is not of the byte-pair encoding."""
            if (seconds := self.seconds(token)) is not None:
                return f"<|{seconds:.2f}|>" if timestamps else ""
            return self.words.get(token, None if token < self.eot else "")

        parts = []
        for text, run in groupby(map(int, ids), written):
            same = list(run)
            parts.append(
                self.bpe.decode(same, skip_special_tokens=False)
                if text is None
                else text * len(same)
            )
        return "".join(parts)

    def seconds(self, token: int) -> float | None:
        """The time of a timestamp token in seconds; None for any other token."""
        if token not in self.times:
            return None
        return round((token - self.timestamp_begin) * TIMESTAMP_STEP, 2)

    def timestamp(self, seconds: float) -> int:
        """The timestamp token nearest to a time in the window, clipped to 0 to 30 s."""
        step = round(seconds / TIMESTAMP_STEP)
        return self.timestamp_begin + min(max(step, 0), TIMESTAMPS - 1)


def suppressed_ids(ids: Mapping[str, int]) -> list[int]:
    """The ids that openai-whisper suppresses everywhere. ids: special tokens by name."""
    symbols = SYMBOLS_ENGLISH if ids["endoftext"] == ENGLISH_END else SYMBOLS_MULTILINGUAL
    return [*map(int, symbols.split()), *(ids[name] for name in CONTROLS)]


def strip_special(text: str) -> str:
    """The text without special tokens that are written out in it, and without surrounding space.

    References of published sets may contain them. Whisper's normalisers drop them before words are
    counted, so they are dropped from training targets too.
    """
    return WRITTEN.sub("", text).strip()


def split_timestamps(text: str) -> list[str | float]:
    """Pieces of a published label and the seconds of the timestamps between them, in order.

    Other special tokens are dropped.
    """
    pieces = [""]
    for number, part in enumerate(WRITTEN.split(text)):  # text and names of tokens in turn
        if number % 2 == 0:
            pieces[-1] += part
        elif SECONDS.fullmatch(part):
            pieces += [part, ""]
    found: list[str | float] = [
        float(one) if number % 2 else one for number, one in enumerate(pieces)
    ]
    return [one for one in found if not isinstance(one, str) or one.strip()]


def load_tokens(
    folder: str | Path, generation: Mapping[str, Any] | None = None, vocab: int | None = None
) -> WhisperTokens:
    """The tokens of a Transformers folder: tokenizer.json and, if present, generation_config.json.

    generation: used instead of that file. Suppressed ids are taken from it, else those of OpenAI.
    vocab: size of the model's embedding.

    Raises:
        InputError: a file is missing or damaged, the tokenizer is not Whisper's, or the two files
            belong to different checkpoints.
    """
    path, generation_path = (Path(folder) / f"{n}.json" for n in ("tokenizer", "generation_config"))
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: save it there with Transformers' "
            "WhisperTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    if generation is None:
        generation = read_json(generation_path) if generation_path.is_file() else {}
    tokenizer = read_json(path)
    special = added_tokens(tokenizer, path)
    plain = tokenizer | {"added_tokens": [], "post_processor": None, "truncation": None}
    try:
        bpe = Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # tokenizers has no exception class of its own
        raise InputError(f"{path} is not a tokenizer ({error!r}): fetch it again") from None
    if "<|nocaptions|>" in special:  # of older checkpoints
        special.setdefault("<|nospeech|>", special["<|nocaptions|>"])
    names = ("endoftext", *CONTROLS, "notimestamps")
    if missing := [f"<|{name}|>" for name in names if f"<|{name}|>" not in special]:
        raise InputError(f"{path} has no token {missing[0]}: it is not a Whisper tokenizer")
    ids = {name: special[f"<|{name}|>"] for name in names}
    if not bpe.encode(" ", add_special_tokens=False).ids:
        raise InputError(f"{path} has no token for a space: fetch it again")
    eot, sot, no_timestamps = ids["endoftext"], ids["startoftranscript"], ids["notimestamps"]
    expected = generation.get("no_timestamps_token_id", no_timestamps)
    if expected != no_timestamps:
        raise InputError(
            f"{path} has <|notimestamps|> at {no_timestamps}, the generation config at {expected}: "
            "the two files belong to different checkpoints"
        )
    multilingual = generation.get("is_multilingual", eot != ENGLISH_END)
    after_sot = range(sot + 1, ids["translate"]) if multilingual else ()
    suppressed = generation.get("suppress_tokens", sorted(suppressed_ids(ids)))
    tokens = WhisperTokens(
        bpe=bpe,
        eot=eot,
        sot=sot,
        transcribe=ids["transcribe"],
        translate=ids["translate"],
        previous=ids["startofprev"],
        no_speech=ids["nospeech"],
        no_timestamps=no_timestamps,
        multilingual=multilingual,
        languages={token.strip("<|>"): id for token, id in special.items() if id in after_sot},
        suppressed=tuple(suppressed or ()),
        suppressed_first=tuple(generation.get("begin_suppress_tokens", [BLANK, eot]) or ()),
    )
    return _with_words(tokens, tokenizer["added_tokens"], path, vocab)


def added_tokens(tokenizer: Mapping[str, Any], name: str | Path) -> dict[str, int]:
    """The added tokens of a parsed tokenizer.json and their ids.

    Raises:
        InputError: it is not a tokenizer.
    """
    try:
        special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{name} is not a tokenizer ({error!r}): fetch it again") from None
    if any(type(word) is not str or type(id) is not int or id < 0 for word, id in special.items()):
        raise InputError(f"{name} is not a tokenizer (a token has no text or id): fetch it again")
    return special


def _with_words(
    tokens: WhisperTokens, added: Sequence[Mapping[str, Any]], path: Path, vocab: int | None
) -> WhisperTokens:
    """The tokens with the words that a fine-tuned checkpoint has after its timestamps.

    Raises:
        InputError: a word has the id of a timestamp, or the tokenizer has more ids than the model.
    """
    words, texts = {}, []
    for token in added:
        id, text = token["id"], token["content"]
        second = tokens.seconds(id)
        if second is not None and text != f"<|{second:.2f}|>":
            raise InputError(
                f"{path} has {text!r} at {id:,}, the id of <|{second:.2f}|>: "
                "add the timestamps to the tokenizer before the words, and train again"
            )
        if id >= tokens.times.stop:
            words[id] = "" if token.get("special") else text
        if words.get(id):
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            texts.append(AddedToken(text, **{flag: bool(token.get(flag)) for flag in flags}))
    tokens.bpe.add_tokens(texts)
    word_ids = {tokens.bpe.token_to_id(word): id for id, word in words.items() if word}
    padding = tuple(id for id in range(tokens.times.stop, vocab or 0) if id not in words)
    tokens = replace(tokens, words=words, word_ids=word_ids, padding=padding)
    if vocab is not None and tokens.vocabulary > vocab:
        raise InputError(
            f"{path} has {tokens.vocabulary:,} tokens and the model {vocab:,}: it belongs to "
            "another model, or the model was saved before its embedding was resized"
        )
    return tokens
