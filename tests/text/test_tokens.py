"""Against openai-whisper's tokenizer and, on the real files, Transformers'."""

import json
from pathlib import Path

import numpy as np
import pytest
import whisper.tokenizer

from flax_distil.errors import InputError
from flax_distil.text.languages import LANGUAGES, to_language_code
from flax_distil.text.tokens import load_tokens

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# name: (multilingual, languages, vocabulary)
KINDS = {"en": (False, 99, 51864), "multi": (True, 99, 51865), "v3": (True, 100, 51866)}

TEXTS = [
    " Hello, it's 10:30 — we'll see.",
    "naïve café, Straße, здравствуйте, 日本語のテキスト, العربية, हिन्दी",
    " \n two  spaces\tand tabs ",
    " ♪ la la ♪ [MUSIC] (laughs) -- 'quoted'",
    "<|endoftext|> <|0.00|> <|en|> are text here",
    "👩‍👩‍👧 🎉",
    "",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """OpenAI's vocabularies as tokenizer.json; no timestamps in "en", as in the published file."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    assets = Path(whisper.tokenizer.__file__).parent / "assets"
    made = {}
    for ranks in ("gpt2", "multilingual"):
        converted = TikTokenConverter(str(assets / f"{ranks}.tiktoken"), PATTERN).converted()
        plain = json.loads(converted.to_str())
        for kind, (multilingual, languages, _) in KINDS.items():
            if multilingual != (ranks == "multilingual"):
                continue
            special = openai(kind).encoding._special_tokens
            added = [
                {"id": id, "content": content, "special": True, "normalized": False}
                | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
                for content, id in special.items()
                if multilingual or id <= special["<|notimestamps|>"]
            ]
            made[kind] = tmp_path_factory.mktemp(kind)
            (made[kind] / "tokenizer.json").write_text(json.dumps(plain | {"added_tokens": added}))
            assert len(whisper.tokenizer.LANGUAGES) >= languages
    return made


@pytest.fixture(scope="module")
def tokens(folders):
    return {kind: load_tokens(folder) for kind, folder in folders.items()}


def openai(kind, **options):
    multilingual, languages, _ = KINDS[kind]
    return whisper.tokenizer.get_tokenizer(multilingual, num_languages=languages, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_and_suppression_equal_openai(tokens, kind):
    ours, theirs = tokens[kind], openai(kind)
    assert (ours.eot, ours.sot, ours.transcribe, ours.translate) == (
        theirs.eot,
        theirs.sot,
        theirs.transcribe,
        theirs.translate,
    )
    assert (ours.previous, ours.no_speech, ours.no_timestamps, ours.timestamp_begin) == (
        theirs.sot_prev,
        theirs.no_speech,
        theirs.no_timestamps,
        theirs.timestamp_begin,
    )
    assert ours.vocabulary == theirs.encoding.n_vocab == KINDS[kind][2]
    controls = [theirs.transcribe, theirs.translate, theirs.sot, theirs.sot_prev, theirs.sot_lm]
    expected = sorted({*theirs.non_speech_tokens, *controls, theirs.no_speech})
    assert ours.suppressed == tuple(expected)
    assert ours.suppressed_first == (theirs.encode(" ")[0], theirs.eot)
    if ours.multilingual:
        by_code = dict(zip(theirs.all_language_codes, theirs.all_language_tokens, strict=True))
        assert ours.languages == by_code
    else:
        assert ours.languages == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_equals_openai_there_and_back(tokens, kind, text):
    ids = tokens[kind].encode(text)
    assert ids == openai(kind).encode(text, disallowed_special=())
    assert tokens[kind].decode(ids) == text
    half = ids[: len(ids) // 2 + 1]  # may end inside a character
    assert tokens[kind].decode(half) == openai(kind).decode(half)


@pytest.mark.parametrize("kind", ["multi", "v3"])
@pytest.mark.parametrize("language", ["en", "Spanish", "haw", "haitian creole", "su"])
@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_prompts_equal_openai(tokens, kind, language, task):
    theirs = openai(kind, language=language.lower(), task=task)
    start = [*theirs.sot_sequence]
    assert tokens[kind].prompt(language, task) == [*start, theirs.no_timestamps]
    assert tokens[kind].prompt(language, task, timestamps=True) == start
    assert tokens[kind].prompt(language, task, True, previous=[5, 6]) == [
        theirs.sot_prev,
        5,
        6,
        *start,
    ]


def test_the_english_only_prompt_has_no_language_and_no_task(tokens):
    assert tokens["en"].prompt() == [50257, 50362]
    assert tokens["en"].prompt("English", timestamps=True) == [50257]
    assert tokens["en"].prompt(previous=[9]) == [50360, 9, 50257, 50362]


@pytest.mark.parametrize("kind", KINDS)
def test_timestamps_are_rendered_or_left_out(tokens, kind):
    ours = tokens[kind]
    begin = ours.timestamp_begin
    spoken = [
        begin,
        *ours.encode(" One."),
        begin + 54,
        begin + 54,
        *ours.encode(" Two."),
        begin + 1500,
    ]
    ids = np.array([*ours.prompt("en", timestamps=True), *spoken, ours.eot])
    assert ours.decode(ids) == " One. Two."
    expected = "<|0.00|> One.<|1.08|><|1.08|> Two.<|30.00|>"
    assert ours.decode(ids, timestamps=True) == expected
    assert openai(kind).decode_with_timestamps(spoken) == expected
    assert [ours.seconds(begin + step) for step in (0, 1, 1500)] == [0.0, 0.02, 30.0]
    assert ours.seconds(begin - 1) is None
    assert [ours.timestamp(t) - begin for t in (0.0, 1.08, 1.091, 30.0, 31.0, -1.0)] == [
        0,
        54,
        55,
        1500,
        1500,
        0,
    ]


def test_the_generation_config_has_the_last_word(folders, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(folders["multi"] / "tokenizer.json")
    config = {
        "suppress_tokens": [7, 8],
        "begin_suppress_tokens": [],
        "is_multilingual": True,
        "no_timestamps_token_id": 50363,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    tokens = load_tokens(tmp_path)
    assert (tokens.suppressed, tokens.suppressed_first) == ((7, 8), ())
    (tmp_path / "generation_config.json").write_text(
        json.dumps(config | {"no_timestamps_token_id": 50364})
    )
    with pytest.raises(InputError, match="at 50363, the generation config at 50364"):
        load_tokens(tmp_path)


@pytest.fixture
def extended(folders, tmp_path):
    """A tokenizer.json with more tokens behind the time of 30 s (or at `first`), and its oracle."""

    def make(kind, added, first=None):
        from transformers import WhisperTokenizerFast

        tokenizer = json.loads((folders[kind] / "tokenizer.json").read_text())
        behind = KINDS[kind][2] if first is None else first
        plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
        begin = openai(kind).timestamp_begin
        times = [
            plain | {"id": begin + step, "content": f"<|{step * 0.02:.2f}|>", "special": False}
            for step in range(1501 if first is None else 0)
        ]
        words = [
            plain | {"id": behind + place, "content": content, "special": special}
            for place, (content, special) in enumerate(added)
        ]
        kept = [token for token in tokenizer["added_tokens"] if token["id"] < begin]
        tokenizer["added_tokens"] = [*kept, *times, *words]
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        return WhisperTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_added_words_are_text_as_in_transformers(extended, tmp_path, kind):
    theirs = extended(kind, [(" poundkey", False), ("<|spk|>", True), ("zażółć", False)])
    ours, first = load_tokens(tmp_path, vocab=KINDS[kind][2] + 8), KINDS[kind][2]
    assert ours.words == {first: " poundkey", first + 1: "", first + 2: "zażółć"}
    assert ours.vocabulary == first + 3
    assert ours.padding == tuple(range(first + 3, first + 8))
    for text in (" the poundkey key", " zażółć x poundkeyzażółć", " poundke y"):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == text
    begin = ours.timestamp_begin
    spoken = [begin, *ours.encode(" Press"), first, first, begin + 54, first + 1, first + 2]
    assert ours.decode(spoken) == " Press poundkey poundkeyzażółć"
    assert ours.decode(spoken, timestamps=True) == (
        "<|0.00|> Press poundkey poundkey<|1.08|>zażółć"
    )
    assert [ours.seconds(begin + 1500), ours.seconds(first)] == [30.0, None]
    assert [ours.is_text(one) for one in (0, ours.eot, begin, first)] == [True, False, False, True]


def test_words_in_the_place_of_times_are_refused(extended, tmp_path):
    """The tokenizers of 2022 had no times: what was added to them got the times' ids."""
    extended("en", [("poundkey", False)], first=50_364)
    with pytest.raises(InputError, match=r"'poundkey' at 50,364, the id of <\|0\.02\|>"):
        load_tokens(tmp_path)


def test_a_model_with_fewer_ids_than_its_tokenizer_is_refused(extended, folders, tmp_path):
    with pytest.raises(InputError, match="51,866 tokens and the model 51,865"):
        load_tokens(folders["v3"], vocab=51_865)
    extended("en", [("x", False)])
    with pytest.raises(InputError, match="before its embedding was resized"):
        load_tokens(tmp_path, vocab=51_864)


@pytest.mark.parametrize("key", ["suppress_tokens", "begin_suppress_tokens"])
@pytest.mark.parametrize("empty", [[], None])
def test_an_empty_list_suppresses_nothing(folders, key, empty):
    field = {"suppress_tokens": "suppressed", "begin_suppress_tokens": "suppressed_first"}[key]
    assert getattr(load_tokens(folders["en"], {key: empty}), field) == ()
    assert getattr(load_tokens(folders["en"], {}), field) != ()


def test_wrong_requests_are_sentences(tokens, tmp_path):
    for call, words in [
        (lambda: tokens["multi"].prompt(), "needs a language"),
        (lambda: tokens["multi"].prompt("yue"), "99 languages and Cantonese"),
        (lambda: tokens["multi"].prompt("en", "sing"), 'no task "sing"'),
        (lambda: tokens["en"].prompt("de"), "cannot transcribe German"),
        (lambda: tokens["en"].prompt(task="translate"), "cannot translate English"),
        (lambda: load_tokens(tmp_path), r"has no tokenizer\.json"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    assert tokens["v3"].prompt("yue")[1] == tokens["v3"].languages["yue"]
    gpt = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(gpt))
    with pytest.raises(InputError, match=r"no token <\|endoftext\|>: it is not a Whisper"):
        load_tokens(tmp_path)
    assert tokens["en"].encode("caf\udce9") == tokens["en"].encode("caf")
    damaged = {"{": "not JSON", "[]": "not JSON with one object", "{}": "not a tokenizer"}
    damaged |= {"[" * 100_000: "nested too deeply"}
    names = ("endoftext", "startoftranscript", "translate", "transcribe", "startofprev")
    names += ("nospeech", "notimestamps", "startoflm")
    added = [{"content": f"<|{name}|>", "id": at} for at, name in enumerate(names)]
    damaged[json.dumps(gpt | {"added_tokens": added})] = "no token for a space"
    for odd in ([{"content": "x", "id": "1"}], [{"content": 1, "id": 1}], [1], None, "x"):
        damaged[json.dumps(gpt | {"added_tokens": odd})] = "not a tokenizer"
    for text, words in damaged.items() | {(json.dumps(gpt | {"model": {}}), "not a tokenizer")}:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=rf"tokenizer\.json .*{words}"):
            load_tokens(tmp_path)


def test_languages_equal_openai():
    assert {code: name.lower() for code, name in LANGUAGES.items()} == whisper.tokenizer.LANGUAGES
    for name, code in whisper.tokenizer.TO_LANGUAGE_CODE.items():
        assert to_language_code(name) == to_language_code(name.title()) == code
    assert to_language_code(" EN ") == "en"
    with pytest.raises(InputError, match=r'"Englsh": did you mean "english"'):
        to_language_code("Englsh")
    for written, code in {"zh-CN": "zh", "en_us": "en", "en-US": "en"}.items():
        assert to_language_code(written) == code
    for unknown in ("klingon", "xx-YY", ""):
        with pytest.raises(InputError, match="Whisper has no language"):
            to_language_code(unknown)
