"""Generation configs: completed where they are old, kept where they say something."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flax_distil.model.dims import dims_to_hf
from flax_distil.model.generation import completed, generation_config
from flax_distil.model.spec import Spec
from flax_distil.model.student import init_student
from flax_distil.options import DecodeOptions

FORCED = [[1, 50_259], [2, 50_359], [3, 50_363]]
OF_2022 = {
    "_from_model_config": True,
    "begin_suppress_tokens": [220, 50_257],
    "bos_token_id": 50_257,
    "decoder_start_token_id": 50_258,
    "eos_token_id": 50_257,
    "forced_decoder_ids": FORCED,
    "max_length": 448,
    "pad_token_id": 50_257,
    "suppress_tokens": [1, 2, 7],
}


@pytest.fixture(scope="module")
def multilingual(tiny_dims, base_folder):
    """A random multilingual model with base's tokenizer."""
    params = jax.device_get(Spec(tiny_dims).init(jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # the prompt decides what is written
    config = dims_to_hf(tiny_dims)
    return Checkpoint(tiny_dims, params, config, generation_config(tiny_dims), base_folder)


@pytest.fixture
def folder(multilingual, tmp_path):
    save_checkpoint(multilingual, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def generate():
    """(folder, options of Transformers' `generate`) -> tokens for a fixed noise."""
    import torch
    from transformers import WhisperForConditionalGeneration

    def run(folder, **options):
        model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
        noise = np.random.default_rng(0).standard_normal((1, 80, 3000), np.float32)
        return model.generate(torch.from_numpy(noise), max_new_tokens=8, **options)[0].tolist()

    return run


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.filterwarnings("ignore")
def test_a_config_of_2022_is_completed_for_language_and_timestamps(folder, tmp_path, generate):
    (folder / "generation_config.json").write_text(json.dumps(OF_2022))
    edit(folder / "config.json", forced_decoder_ids=FORCED)
    with pytest.raises(ValueError, match="outdated"):
        generate(folder, language="de")
    teacher = load_checkpoint(folder)
    student = init_student(teacher, 1)
    assert student.generation["suppress_tokens"] == [1, 2, 7]
    assert "forced_decoder_ids" not in student.generation
    save_checkpoint(student, tmp_path / "student")
    assert "forced_decoder_ids" not in json.loads((tmp_path / "student/config.json").read_text())
    german = generate(tmp_path / "student", language="de")
    assert german != generate(tmp_path / "student", language="fr")
    timed = generate(tmp_path / "student", language="de", return_timestamps=True)
    assert any(token > 50_363 for token in timed)


@pytest.mark.filterwarnings("ignore")
def test_the_language_of_a_student_is_kept_and_used(multilingual, tmp_path, generate):
    """Without it both detect a language; a language that is asked for wins."""
    generation = multilingual.generation | {"language": "<|de|>", "task": "transcribe"}
    student = init_student(replace(multilingual, generation=generation), 1)
    save_checkpoint(student, tmp_path / "german")
    found = load_checkpoint(tmp_path / "german")
    assert (found.generation["language"], found.generation["task"]) == ("<|de|>", "transcribe")
    german, named = generate(tmp_path / "german"), generate(tmp_path / "german", language="de")
    assert german == named != generate(tmp_path / "german", language="fr")

    noise = np.random.default_rng(0).standard_normal((1, 480_000), np.float32)
    recognizer, options = make_recognizer(found), DecodeOptions(max_tokens=4)
    assert recognizer.language == "de"
    assert recognize(recognizer, noise, options)[0].language == "de"
    assert recognize(recognizer, noise, options, language="fr")[0].language == "fr"
    assert make_recognizer(multilingual).language is None
    for odd in ("<|xx|>", "yue"):
        with pytest.raises(InputError):
            make_recognizer(replace(found, generation=generation | {"language": odd}))


@pytest.mark.parametrize("key", ["suppress_tokens", "begin_suppress_tokens", "alignment_heads"])
def test_an_empty_list_stays_empty(folder, tmp_path, key):
    edit(folder / "generation_config.json", **{key: []})
    student = init_student(load_checkpoint(folder), 1)
    save_checkpoint(student, tmp_path / "student")
    again = load_checkpoint(tmp_path / "student")
    assert again.generation[key] == student.generation[key] == []
    others = {"suppress_tokens", "begin_suppress_tokens", "alignment_heads"} - {key}
    assert all(again.generation[other] for other in others)


def test_without_a_generation_config_that_of_the_config_is_used(folder):
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", suppress_tokens=[], begin_suppress_tokens=[220])
    generation = load_checkpoint(folder).generation
    assert (generation["suppress_tokens"], generation["begin_suppress_tokens"]) == ([], [220])
    assert generation["lang_to_id"]["<|de|>"] == 50_261


def test_a_vocabulary_is_what_its_tokenizer_says(tiny_en_folder, tiny_dims, tmp_path):
    """51,866 tokens: large-v3's, or an English one with two added words."""
    tokenizer = json.loads((tiny_en_folder / "tokenizer.json").read_text())
    words = [
        {"id": 51_864 + place, "content": word, "special": False}
        for place, word in enumerate((" poundkey", " loginus"))
    ]
    tokenizer["added_tokens"] += words
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    dims = replace(tiny_dims, vocab=51_866)
    ours = completed({}, {}, dims, tmp_path)
    assert ours == generation_config(replace(dims, vocab=51_864))
    assert completed({}, {}, dims, tmp_path / "none")["is_multilingual"]
    padded = replace(dims, vocab=51_904)
    assert completed({}, {}, padded, tmp_path)["no_timestamps_token_id"] == 50_362
    with pytest.raises(InputError, match=r"51,904 tokens is none of Whisper's.*tokenizer\.json"):
        completed({}, {}, padded, tmp_path / "none")
    known = completed({"eos_token_id": 7}, {}, padded, tmp_path / "none")
    assert known["eos_token_id"] == 7


@pytest.mark.parametrize(
    ("heads", "kept"),
    [
        ([[0, 1], [9, 0], [1, 7]], [[0, 1]]),
        ([[9, 0]], [[1, 0], [1, 1], [1, 2], [1, 3]]),
        (None, [[1, 0], [1, 1], [1, 2], [1, 3]]),
        ([], []),
    ],
)
def test_heads_of_layers_that_are_not_there_go(folder, heads, kept):
    """As published students have them, copied from their teachers."""
    edit(folder / "generation_config.json", alignment_heads=heads)
    assert load_checkpoint(folder).generation["alignment_heads"] == kept


@pytest.mark.parametrize(
    "heads", ["x", [1, 2], [[1]], [[1, 2, 3]], [["a", "b"]], [[0.5, 1]], 3, {}]
)
def test_heads_that_are_no_pairs_are_refused(folder, heads):
    edit(folder / "generation_config.json", alignment_heads=heads)
    with pytest.raises(InputError, match="alignment_heads"):
        load_checkpoint(folder)


@pytest.mark.parametrize("key", ["suppress_tokens", "begin_suppress_tokens"])
@pytest.mark.parametrize("value", ["x", [1.5], ["1"], [[1]], 7, [True]])
def test_suppressed_tokens_are_whole_numbers(folder, key, value):
    edit(folder / "generation_config.json", **{key: value})
    with pytest.raises(InputError, match=f"{key} .* is of another type"):
        load_checkpoint(folder)


@pytest.mark.parametrize("key", ["lang_to_id", "task_to_id", "language"])
def test_tables_are_tables(folder, key):
    edit(folder / "generation_config.json", **{key: [1]})
    with pytest.raises(InputError, match=key):
        load_checkpoint(folder)
