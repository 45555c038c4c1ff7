"""Whisper's token ids: special tokens, prompts, text to ids and back.

A tokenizer file is read as a plain byte-pair encoding plus a table of special tokens, and the two
are kept apart. So a transcript that contains "<|endoftext|>" is encoded as those thirteen
characters, and timestamps are there even when the file leaves them out, as tiny.en's does.
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

TIMESTAMPS = 1501  # <|0.00|> … <|30.00|>
TIMESTAMP_STEP = 0.02  # seconds from one to the next

# What annotates speech and is not spoken.
BRACKETS = '"#()*+/:;<=>@[\\]^_`{|}~「」『』'
REPEATED_SIGNS = "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪"
MUSIC = "♩♪♫♬♭♮♯"


@dataclass(frozen=True, eq=False)
class WhisperTokens:
    """The vocabulary of one Whisper checkpoint.

    Ids from `eot` on are special, up to the time of 30 s. Behind it may stand words that a
    fine-tuned checkpoint added, and ids of padding, which mean nothing.
    """

    bpe: Tokenizer = field(repr=False)
    eot: int
    sot: int
    transcribe: int
    translate: int
    previous: int  # starts the text of the segment before
    no_speech: int
    no_timestamps: int
    multilingual: bool
    languages: dict[str, int] = field(repr=False)  # code → id; empty when English-only
    suppressed: tuple[int, ...] = field(repr=False)  # never generated
    suppressed_first: tuple[int, ...]  # not generated as the first token
    words: dict[int, str] = field(default_factory=dict, repr=False)  # added; "" where special
    word_ids: dict[int, int] = field(
        default_factory=dict, repr=False
    )  # the bpe's ids of them → ours
    padding: tuple[int, ...] = field(default=(), repr=False)  # ids of the model that mean nothing

    @property
    def timestamp_begin(self) -> int:
        """The id of `<|0.00|>`; timestamps follow, 0.02 s apart, up to 30 s."""
        return self.no_timestamps + 1

    @property
    def times(self) -> range:
        """The ids of the timestamps. `id in times` is fast for an `int` alone."""
        return range(self.timestamp_begin, self.timestamp_begin + TIMESTAMPS)

    @property
    def vocabulary(self) -> int:
        """Number of ids, timestamps and added words included, padding not.

        51864, 51865 or 51866 in published checkpoints.
        """
        return max(self.words, default=self.times.stop - 1) + 1

    def is_text(self, token: int) -> bool:
        """Whether a token is a piece of text, and no control and no time."""
        return token < self.eot or token in self.words

    def prompt(
        self,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        previous: Sequence[int] = (),
    ) -> list[int]:
        """What the decoder reads before its first own token.

        `[previous …] sot [language task] [no_timestamps]`: language and task only where the
        checkpoint is multilingual, no_timestamps unless `timestamps`. `previous` are text ids, as
        many as the caller has room for.
        Raises InputError for a language or task the checkpoint lacks, or a missing language.
        """
        start = [self.previous, *previous, self.sot] if previous else [self.sot]
        return start + self._language_task(language, task) + [self.no_timestamps] * (not timestamps)

    def _language_task(self, language: str | None, task: str) -> list[int]:
        if task not in ("transcribe", "translate"):
            raise InputError(f'there is no task "{task}": use "transcribe" or "translate"')
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

    def lacks(self, language: str | None, task: str = "transcribe") -> str | None:
        """Why the checkpoint cannot read a language; None where it can, or may detect one."""
        try:
            self._language_task(language or ("en" if self.multilingual else None), task)
        except InputError as error:
            return str(error)
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is taken for a special token.

        Bytes of a command line that are no UTF-8, half surrogate pairs in Python, are left out.
        """
        whole = text.encode("utf-8", "ignore").decode("utf-8")
        ids = self.bpe.encode(whole, add_special_tokens=False).ids
        return [self.word_ids.get(token, token) for token in ids]

    def decode(self, ids: Iterable[SupportsIndex], timestamps: bool = False) -> str:
        """Text of ids, special tokens left out; `timestamps` writes those as `<|1.08|>`."""
        parts = []
        for moment, run in groupby(map(int, ids), self.seconds):
            if moment is None:
                parts.append(self._text(run))
            elif timestamps:
                parts.append(f"<|{moment:.2f}|>" * len(list(run)))
        return "".join(parts)

    def seconds(self, token: int) -> float | None:
        """The time a timestamp token stands for, None for any other token."""
        if token not in self.times:
            return None
        return round((token - self.timestamp_begin) * TIMESTAMP_STEP, 2)

    def timestamp(self, seconds: float) -> int:
        """The timestamp token nearest to a time in the window, held between 0 and 30 s."""
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
    """The tokens of a Transformers folder: tokenizer.json and, where there, generation_config.json.

    generation: what is known in the place of that file. Suppressed ids come from it; where it does
    not name them, they are derived as OpenAI does. vocab: ids that the model has. Raises InputError
    for a missing or damaged file, a tokenizer that is not Whisper's, or files that do not belong
    together.
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
    """The ids of what a parsed tokenizer.json has beside its byte pairs.

    Raises:
        InputError: it is no tokenizer.
    """
    try:
        special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{name} is no tokenizer ({error!r}): fetch it again") from None
    if any(type(word) is not str or type(id) is not int or id < 0 for word, id in special.items()):
        raise InputError(f"{name} is no tokenizer (a token has no text or no id): fetch it again")
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
    except Exception as error:  # tokenizers has no kind of its own
        raise InputError(f"{name} is no tokenizer ({error!r}): fetch it again") from None

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

    # English-only checkpoints keep GPT-2's vocabulary, whose last id is the end of text.
    multilingual = generation.get("is_multilingual", eot != 50256)
    languages = {token.strip("<|>"): id for token, id in special.items() if sot < id < translate}
    controls = {sot, translate, transcribe, find("startoflm"), previous, no_speech}
    if not (blank := _ids(bpe, " ")):
        raise InputError(f"{name} has no token for a space: fetch it again")
    suppressed = generation.get("suppress_tokens", sorted(non_speech(bpe) | controls))
    suppressed_first = generation.get("begin_suppress_tokens", [*blank, eot])
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
    """The tokens with the words that a fine-tuned checkpoint has behind the time of 30 s.

    Raises:
        InputError: a word has the id of a time, or the model lacks ids that the tokenizer has.
    """
    times = tokens.times
    for token in added:
        second = tokens.seconds(token["id"])
        if second is not None and token["content"] != f"<|{second:.2f}|>":
            raise InputError(
                f"{name} has {token['content']!r} at {token['id']:,}, the id of <|{second:.2f}|>: "
                "add the times to the tokenizer first, then the words, and train again"
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
            f"{name} has {tokens.vocabulary:,} tokens and the model {vocab:,}: it is another "
            "model's, or the model was saved before its embedding was resized"
        )
    unknown = (id for id in range(times.stop, vocab or 0) if id not in words)
    return replace(tokens, padding=tuple(unknown))


def non_speech(bpe: Tokenizer) -> set[int]:
    """Ids of speaker tags, brackets and music signs, which annotate speech and are not spoken.

    As in openai-whisper: a sign counts when it is one token, with or without a space before it; of
    the music signs the first of several tokens counts. Hyphens and apostrophes may stand inside
    words and not begin them.
    """
    ids = {_ids(bpe, " -")[0], _ids(bpe, " '")[0]}
    for sign in (*BRACKETS, *REPEATED_SIGNS.split(), *MUSIC):
        for tokens in (_ids(bpe, sign), _ids(bpe, " " + sign)):
            if len(tokens) == 1 or sign in MUSIC:
                ids.add(tokens[0])
    return ids


def _ids(bpe: Tokenizer, text: str) -> list[int]:
    return bpe.encode(text, add_special_tokens=False).ids
