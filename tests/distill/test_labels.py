"""Labels of another vocabulary, of another teacher, without anything before them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from flax_distil.config import DistillConfig, InitStudentConfig, TrainingDataConfig
from flax_distil.data.mixing import training_sources
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.distill import trainer
from flax_distil.distill.check import check_ids, check_labels, warn_of_prompts
from flax_distil.distill.runs import generation_of, training_facts
from flax_distil.distill.trainer import run
from flax_distil.errors import InputError
from flax_distil.model import student as student_module
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.pseudo_label.jobs import fingerprint
from flax_distil.text.tokens import load_tokens


@pytest.fixture
def config(random_folders, tmp_path) -> DistillConfig:
    teacher, student = map(str, random_folders)
    return DistillConfig(teacher, student, tmp_path / "run")


def store(folder: Path, **settings) -> Path:
    folder.mkdir()
    made = {"model": "whisper-base", "task": "transcribe", "timestamps": True, "weights": "other"}
    (folder / "labels.json").write_text(json.dumps(made | settings))
    return folder


def manifest(folder: Path, *labels: list[int], **columns: str) -> tuple[TrainingDataConfig, ...]:
    path = folder / "clips.jsonl"
    rows = [
        {"audio": f"{n}.wav", "duration": 1.0, "token_ids": ids} | columns
        for n, ids in enumerate(labels)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (TrainingDataConfig(str(path), target="label"),)


def test_labels_of_another_vocabulary_are_refused_before_training(config, tmp_path):
    theirs = store(tmp_path / "labels", vocabulary=51_865)
    message = r"labels holds token ids of whisper-base .* 51,865 tokens, and the student .* 51,864"
    with pytest.raises(InputError, match=message):
        run(replace(config, labels=(theirs,)))
    with pytest.raises(InputError, match=message):
        run(replace(config, data=(TrainingDataConfig(str(theirs)),)))
    assert not config.output_dir.exists()


def test_times_of_large_v2_are_refused_by_large_v3(config, base_folder, tmp_path):
    """Whose first time is the other's <|notimestamps|>; with the vocabulary's size and without."""
    v2 = load_tokens(base_folder)
    v3 = replace(v2, no_timestamps=v2.no_timestamps + 1)
    labels = (store(tmp_path / "labels", vocabulary=v2.vocabulary),)
    teacher = load_checkpoint(config.teacher)
    check_labels(replace(config, labels=labels), teacher, v2)
    with pytest.raises(InputError, match=r"51,865 tokens, and the student .* 51,866"):
        check_labels(replace(config, labels=labels), teacher, v3)
    data = manifest(tmp_path, [v2.timestamp(0), 440, v2.timestamp(2)])
    sources = training_sources(replace(config, data=data, language="en"), v2)
    check_ids(sources, v2)
    with pytest.raises(InputError, match=r"the token id 50364 in labels, .* of 51,866 tokens"):
        check_ids(sources, v3)


def test_ids_that_the_student_lacks_are_refused(config, tmp_path, tiny_en_folder):
    data = manifest(tmp_path, [7, 8], [51_864])
    tokens = load_tokens(tiny_en_folder)
    sources = training_sources(replace(config, data=data), tokens)
    with pytest.raises(InputError, match=r"the token id 51864 in labels, .* of 51,864 tokens"):
        check_ids(sources, tokens)


def test_another_teacher_is_said_once(config, tmp_path, caplog):
    teacher = load_checkpoint(config.teacher)
    tokens = teacher.tokens()
    ours = store(tmp_path / "ours", weights=fingerprint(teacher.params))
    one, two = store(tmp_path / "one"), store(tmp_path / "two")
    check_labels(replace(config, labels=(ours,)), teacher, tokens)
    assert not caplog.records
    check_labels(replace(config, labels=(one, ours, two)), teacher, tokens)
    (record,) = caplog.records
    assert f"{one} by whisper-base (other), {two} by whisper-base" in record.getMessage()
    assert str(ours) not in record.getMessage()


@pytest.mark.parametrize(
    ("columns", "probability", "said"),
    [({}, 0.2, 1), ({}, 0.0, 0), ({"speaker": "a"}, 0.2, 0)],
)
def test_prompts_that_nothing_can_give_are_said_once(
    config, tmp_path, tiny_en_folder, caplog, columns, probability, said
):
    data = manifest(tmp_path, [7], [8], [9], **columns)
    config = replace(config, data=data, prompt_probability=probability)
    sources = training_sources(config, load_tokens(tiny_en_folder))
    with caplog.at_level(logging.WARNING, "flax_distil.distill"):
        caplog.clear()
        warn_of_prompts(config, sources)
    assert len(caplog.records) == said


def test_languages_and_tasks_of_the_data(config, base_folder, tiny_en_folder, tmp_path):
    """As rows, tables and the run name them; a row of no known language makes them unknown."""
    tokens = load_tokens(base_folder)
    (tmp_path / "more").mkdir()
    german, plain = (
        manifest(tmp_path, [7], [8], lang="German"),
        manifest(tmp_path / "more", [7]),
    )

    def found(*data, tokens=tokens, **changes):
        run = replace(config, data=data, prompt_probability=0.0, **changes)
        return training_facts(run, training_sources(run, tokens), tokens)

    named = replace(plain[0], language="de-DE", task="translate")
    alone = {"languages": ["de"], "tasks": ["transcribe"], "previous_text": False}
    alone |= {"timestamps": False}
    assert found(*german) == alone
    both = found(*german, named)
    assert both == alone | {"tasks": ["transcribe", "translate"]}
    assert found(*german, *plain, language="fr")["languages"] == ["de", "fr"]
    assert found(*plain, tokens=load_tokens(tiny_en_folder))["languages"] == ["en"]


def test_whether_the_text_before_is_learnt(config, tiny_en_folder, tmp_path, random_folders):
    """Where it is not, a student's long recordings are read without (in Transformers too)."""
    student, tokens = load_checkpoint(random_folders[1]), load_tokens(tiny_en_folder)
    data = manifest(tmp_path, [7], [8], speaker="a")
    for probability, learnt in [(0.0, False), (0.2, True)]:
        run = replace(config, data=data, prompt_probability=probability)
        facts = training_facts(run, training_sources(run, tokens), tokens)
        assert facts["previous_text"] is learnt
        (tmp_path / "versions.json").write_text(json.dumps(facts))
        generation = generation_of(tmp_path, student)
        assert generation.get("condition_on_prev_tokens", True) is learnt
        exported = replace(student, generation=generation)
        assert make_recognizer(exported).previous_text is learnt


def test_whether_timestamps_are_learnt(config, tiny_en_folder, tmp_path, random_folders):
    student, tokens = load_checkpoint(random_folders[1]), load_tokens(tiny_en_folder)
    timed = [tokens.timestamp(0.0), 7, tokens.timestamp(1.0)]
    for labels, probability, learnt in (
        (([7], [8]), 0.5, False),
        (([7], timed), 0.5, True),
        (([7], timed), 0.0, False),
    ):
        data = manifest(tmp_path, *labels)
        run = replace(config, data=data, prompt_probability=0.0, timestamp_probability=probability)
        facts = training_facts(run, training_sources(run, tokens), tokens)
        assert facts["timestamps"] is learnt
        (tmp_path / "versions.json").write_text(json.dumps(facts))
        exported = replace(student, generation=generation_of(tmp_path, student))
        assert make_recognizer(exported).timestamps is learnt


def test_a_student_of_one_language_says_so(tmp_path, base_folder, random_folders):
    base, english = load_checkpoint(base_folder), load_checkpoint(random_folders[1])
    forced = replace(base, generation=base.generation | {"forced_decoder_ids": [[1, None]]})
    assert generation_of(tmp_path, base) == base.generation  # a run before there were facts
    for languages, tasks, added in [
        (["ko"], ["transcribe"], {"language": "<|ko|>", "task": "transcribe"}),
        (["de", "ko"], ["transcribe"], {}),
        (["de"], ["transcribe", "translate"], {}),
        (None, ["transcribe"], {}),
    ]:
        facts = {"languages": languages, "tasks": tasks}
        (tmp_path / "versions.json").write_text(json.dumps(facts))
        assert generation_of(tmp_path, base) == base.generation | added
        assert generation_of(tmp_path, english) == english.generation
        assert ("forced_decoder_ids" in generation_of(tmp_path, forced)) is not bool(added)


def test_models_of_the_hub_have_revisions(config, monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return load_checkpoint(random_student)

    random_student = config.student
    monkeypatch.setattr(trainer, "load_checkpoint", load)
    monkeypatch.setattr(student_module, "load_checkpoint", load)
    with pytest.raises(InputError, match="label store"):
        run(replace(config, teacher="a/b@v1"))
    student_module.run(InitStudentConfig("a/b@v3", config.output_dir, 1))
    assert asked == ["a/b@v1", random_student, "a/b@v3"]
