"""Whisper's token ids: special tokens, prompts, text to ids and back.

A tokenizer file is read as a byte-pair encoding and a separate table of special tokens. So a
transcript that contains "<|endoftext|>" is encoded as thirteen characters, and timestamps exist
even where the file leaves them out, as that of tiny.en does.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, SupportsIndex

from tokenizers import AddedToken, Tokenizer

from flax_distil.errors import InputError, read_json
from flax_distil.text.languages import LANGUAGES, to_language_code
from flax_distil.text.suppressed import BLANK, CONTROLS, ENGLISH_END, suppressed_ids

TIMESTAMPS = 1501  # <|0.00|> … <|30.00|>
TIMESTAMP_STEP = 0.02  # seconds between two of them


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
        parts = []
        for moment, run in groupby(map(int, ids), self.seconds):
            if moment is None:
                parts.append(self._text(run))
            elif timestamps:
                parts.append(f"<|{moment:.2f}|>" * len(list(run)))
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

    def _text(self, ids: Iterable[int]) -> str:
        parts = []
        for word, run in groupby(ids, self.words.get):
            if word is None:
                text = [token for token in run if token < self.eot]
                parts.append(self.bpe.decode(text, skip_special_tokens=False))
            else:
                parts.append(word * len(list(run)))
        return "".join(parts)


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
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: save it there with Transformers' "
            "WhisperTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    generation_path = folder / "generation_config.json"
    if generation is None:
        generation = read_json(generation_path) if generation_path.is_file() else {}
    return read_tokens(read_json(path), generation, str(path), vocab)


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


def read_tokens(
    tokenizer: dict, generation: Mapping[str, Any], name: str, vocab: int | None = None
) -> WhisperTokens:
    """`load_tokens` from the two parsed files; `name` is for error messages."""
    special = added_tokens(tokenizer, name)
    try:
        bpe = Tokenizer.from_str(
            json.dumps(tokenizer | {"added_tokens": [], "post_processor": None, "truncation": None})
        )
    except Exception as error:  # tokenizers has no exception class of its own
        raise InputError(f"{name} is not a tokenizer ({error!r}): fetch it again") from None

    def find(*names: str) -> int:
        for token in names:
            if f"<|{token}|>" in special:
                return special[f"<|{token}|>"]
        raise InputError(f"{name} has no token <|{names[0]}|>: it is not a Whisper tokenizer")

    eot, sot, translate = find("endoftext"), find("startoftranscript"), find("translate")
    transcribe, previous = find("transcribe"), find("startofprev")
    # Older checkpoints call the same token <|nocaptions|>.
    no_speech, no_timestamps = find("nospeech", "nocaptions"), find("notimestamps")
    expected = generation.get("no_timestamps_token_id", no_timestamps)
    if expected != no_timestamps:
        raise InputError(
            f"{name} has <|notimestamps|> at {no_timestamps}, the generation config at {expected}: "
            "the two files belong to different checkpoints"
        )

    multilingual = generation.get("is_multilingual", eot != ENGLISH_END)
    languages = {token.strip("<|>"): id for token, id in special.items() if sot < id < translate}
    ids = {control: find(control) for control in ("endoftext", *CONTROLS[:-1])}
    suppressed = generation.get(
        "suppress_tokens", sorted(suppressed_ids(ids | {"nospeech": no_speech}))
    )
    if not bpe.encode(" ", add_special_tokens=False).ids:
        raise InputError(f"{name} has no token for a space: fetch it again")
    suppressed_first = generation.get("begin_suppress_tokens", [BLANK, eot])
    tokens = WhisperTokens(
        bpe=bpe,
        eot=eot,
        sot=sot,
        transcribe=transcribe,
        translate=translate,
        previous=previous,
        no_speech=no_speech,
        no_timestamps=no_timestamps,
        multilingual=multilingual,
        languages=languages if multilingual else {},
        suppressed=tuple(suppressed or ()),
        suppressed_first=tuple(suppressed_first or ()),
    )
    return with_words(tokens, tokenizer["added_tokens"], name, vocab)


def with_words(
    tokens: WhisperTokens, added: Sequence[Mapping[str, Any]], name: str, vocab: int | None
) -> WhisperTokens:
    """The tokens with the words that a fine-tuned checkpoint has after its timestamps.

    Raises:
        InputError: a word has the id of a timestamp, or the tokenizer has more ids than the model.
    """
    times = tokens.times
    for token in added:
        second = tokens.seconds(token["id"])
        if second is not None and token["content"] != f"<|{second:.2f}|>":
            raise InputError(
                f"{name} has {token['content']!r} at {token['id']:,}, the id of <|{second:.2f}|>: "
                "add the timestamps to the tokenizer before the words, and train again"
            )
    behind = [token for token in added if token["id"] >= times.stop]
    words = {token["id"]: "" if token.get("special") else token["content"] for token in behind}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokens.bpe.add_tokens(
        [
            AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in flags})
            for token in behind
            if words[token["id"]]
        ]
    )
    word_ids = {tokens.bpe.token_to_id(word): id for id, word in words.items() if word}
    tokens = replace(tokens, words=words, word_ids=word_ids)
    if vocab is not None and tokens.vocabulary > vocab:
        raise InputError(
            f"{name} has {tokens.vocabulary:,} tokens and the model {vocab:,}: it belongs to "
            "another model, or the model was saved before its embedding was resized"
        )
    unknown = (id for id in range(times.stop, vocab or 0) if id not in words)
    return replace(tokens, padding=tuple(unknown))
