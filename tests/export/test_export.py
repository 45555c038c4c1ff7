import json
import tomllib
import warnings
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_distil.config import (
    ComputeConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    OptimizerConfig,
    TrainingDataConfig,
)
from flax_distil.data.loader import LoaderState
from flax_distil.decode.recognizer import make_recognizer, recognize
from flax_distil.distill.checkpoints import Checkpoints, RunProgress
from flax_distil.distill.runs import RECIPE
from flax_distil.distill.setup import trainable_part
from flax_distil.distill.step import initial_state
from flax_distil.errors import InputError
from flax_distil.evaluate.report import make_report
from flax_distil.evaluate.results import BatchTime, ClipResult, Results
from flax_distil.export import formats, run
from flax_distil.export.card import hub_name, model_card
from flax_distil.export.verify import differing_texts, largest_difference, synthetic_clip
from flax_distil.model.checkpoint import load_checkpoint, save_checkpoint
from flax_distil.model.student import same_arrays
from flax_distil.options import DecodeOptions
from flax_distil.pseudo_label.store import SETTINGS
from flax_distil.recipe import save_recipe


@pytest.fixture(scope="module")
def student(random_folders):
    return load_checkpoint(random_folders[1])


@pytest.fixture(scope="module")
def exported(random_folders, tmp_path_factory):
    """All three formats, written once."""
    folder = tmp_path_factory.mktemp("exported")
    every = ("transformers", "openai", "ctranslate2")
    return run(ExportConfig(str(random_folders[1]), folder, every))


def test_the_pipeline_of_transformers_writes_our_text(exported, student):
    from transformers import pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline's own, about its defaults
        recognise = pipeline("automatic-speech-recognition", model=str(exported["transformers"]))
        theirs = recognise(synthetic_clip(), generate_kwargs={"max_new_tokens": 12})
    options = DecodeOptions(max_tokens=12)
    ours = recognize(make_recognizer(student), synthetic_clip()[None], options)[0]
    assert len(ours.tokens) > 3
    assert theirs["text"].strip() == ours.text


def test_texts_that_reach_the_limit_are_compared_up_to_it(exported):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformers' own, about its defaults
        assert differing_texts(exported["transformers"], [synthetic_clip()], max_tokens=8) == []


def test_logits_equal_those_of_pytorch(exported):
    # Random weights make logits of order 1; float32 through one layer leaves 1e-5 of it.
    assert largest_difference(exported["transformers"]) < 1e-4


def test_openai_whisper_loads_the_same_numbers(exported, student):
    import whisper

    model = whisper.load_model(str(exported["openai"] / "model.pt"))
    assert model.dims.n_text_layer == 1
    ours = student.params["decoder"]["tokens"]["embedding"]
    assert np.array_equal(model.decoder.token_embedding.weight.detach().numpy(), ours)
    assert same_arrays(load_checkpoint(exported["openai"] / "model.pt").params, student.params)


def test_faster_whisper_loads_it(exported, student):
    from faster_whisper import WhisperModel

    model = WhisperModel(str(exported["ctranslate2"]), device="cpu", compute_type="float32")
    assert not model.model.is_multilingual
    assert same_arrays(load_checkpoint(exported["ctranslate2"]).params, student.params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_the_rounded_ones(random_folders, student, tmp_path, dtype):
    import jax
    import jax.numpy as jnp

    every = ("transformers", "openai", "ctranslate2")
    folders = run(ExportConfig(str(random_folders[1]), tmp_path, every, dtype=dtype))
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype).astype("float32"), student.params)
    for folder in (*list(folders.values())[::2], folders["openai"] / "model.pt"):
        assert same_arrays(load_checkpoint(folder).params, rounded), folder


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("train_encoder", [False, True])
def test_a_training_run_gives_its_trained_numbers(
    random_folders, student, tmp_path, scan, train_encoder
):
    import jax

    compute = ComputeConfig(scan_layers=scan)
    config = DistillConfig(
        *map(str, random_folders),
        labels=(),
        output_dir=tmp_path / "run",
        train_encoder=train_encoder,
        compute=compute,
    )
    save_recipe(config, tmp_path / "run" / RECIPE)
    trained = jax.tree.map(lambda leaf: leaf + 1, student.params)
    if train_encoder:
        trained["encoder"]["positions"] = student.params["encoder"]["positions"]
    else:
        trained["encoder"] = student.params["encoder"]
    trainable = trainable_part(trained, train_encoder, scan)
    for step, best in ((3, False), (2, True)):
        state = initial_state(trainable, config.optimizer)
        state = state._replace(step=np.int32(step))
        save_state(tmp_path / "run", state, best)

    run(ExportConfig(str(tmp_path / "run"), tmp_path / "out"))
    assert same_arrays(load_checkpoint(tmp_path / "out").params, trained)
    assert "## Recipe" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="no checkpoint 7; it has 2, 3"):
        run(ExportConfig(str(tmp_path / "run"), tmp_path / "out", checkpoint=7))


def save_state(folder, state, best):
    checkpoints = Checkpoints(folder, keep=2)
    progress = RunProgress(LoaderState(seed=0))
    checkpoints.save(state, progress, best)
    checkpoints.close()


def test_verification_passes_a_good_export_and_stops_a_bad_one(
    random_folders, tmp_path, monkeypatch, caplog
):
    config = ExportConfig(str(random_folders[1]), tmp_path / "a", verify=True)
    with caplog.at_level("INFO"):
        assert run(config) == {"transformers": tmp_path / "a"}
    assert "differ from ours by at most" in caplog.text
    monkeypatch.setattr(formats, "largest_difference", lambda folder, audio: float("nan"))
    with pytest.raises(InputError, match=r"differ from ours by nan, over 0\.001"):
        run(config)


def test_the_card_has_the_figures_and_a_head_that_the_hub_reads(random_folders, tmp_path):
    from huggingface_hub import ModelCard

    part, report = {"test": "short", "setting": "", "dataset": "clean"}, tmp_path / "report.json"
    about = dict(id="c", speaker=None, language="en", seconds=10.0, reference="the " * 10)
    texts, models = "the " * 9, {"teacher": ("t", 40_000_000), "student": ("s", 30_000_000)}
    clips = [ClipResult(**part, **about, model=name, text=texts) for name in models]
    seconds = {"teacher": 1.5, "student": 1.0}
    results = Results()
    results.add(clips, BatchTime(**part, clips=1, audio_seconds=10.0, windows=1, seconds=seconds))
    config = EvaluateConfig(tuple(models), ("clean",), resamples=10)
    make_report(config, models, {}, results, {}, []).save(tmp_path)
    run(ExportConfig(str(random_folders[1]), tmp_path / "my", report=report, license="mit"))
    card = ModelCard.load(tmp_path / "my" / "README.md")
    assert (card.data.license, card.data.language, card.data.metrics) == ("mit", "en", ["wer"])
    assert "| student | 30.0 M | 10.0 | 0.100 | 1.50× |" in card.text
    assert "# my" in card.text


def test_the_card_of_a_run_has_its_facts_and_no_path_of_this_machine(student, tmp_path):
    from huggingface_hub import ModelCard

    labels, run_folder = tmp_path / "filtered", tmp_path / "run"
    labels.mkdir()
    (labels / SETTINGS).write_text(json.dumps({"data": {"source": "openslr/librispeech_asr"}}))
    config = DistillConfig(
        "/cache/models/whisper-tiny.en",
        str(tmp_path / "student"),
        run_folder,
        labels=(labels,),
        data=(TrainingDataConfig(str(tmp_path / "more.jsonl"), weight=2.0),),
        batch_size=8,
        optimizer=OptimizerConfig(steps=300),
    )
    save_recipe(config, run_folder / RECIPE)
    lines = [
        {"step": 10, "loss": 2.0, "validation/wer": 31.0},
        {"step": 20, "validation/wer": 30.5},
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    generation = student.generation | {"trained_with_timestamps": False}
    student = replace(student, generation=generation, source=tmp_path)
    export = ExportConfig(str(run_folder), Path("out"))
    for format, option in (("transformers", "chunk_length_s=15"), ("openai", "=True")):
        text = model_card(student, export, format, Path("out"))
        (tmp_path / "README.md").write_text(text)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == "openai/whisper-tiny.en"
        assert card.data.datasets == ["openslr/librispeech_asr"]
        assert str(tmp_path) not in text
        assert "None" not in text
        assert f"{option})" in text
        for fact in (
            "made from those of openai/whisper-tiny.en, whose licence is MIT",
            "Training data: openslr/librispeech_asr, more.jsonl.",
            "trained without timestamps",
            'teacher = "whisper-tiny.en"',
            "batch_size = 8\noptimizer.steps = 300\n",
            "Error rate in validation: 30.5 % after 20 updates",
        ):
            assert fact in text
        assert "learning_rate" not in text  # the default
    assert tomllib.loads(text.split("```toml")[1].split("```")[0])["data"] == [
        {"source": "more.jsonl", "weight": 2.0}
    ]


def test_base_models_of_cards():
    for name, base in (
        ("openai/whisper-base@main", "openai/whisper-base"),
        ("whisper-base", "openai/whisper-base"),
        ("/x/models/whisper-large-v3-turbo", "openai/whisper-large-v3-turbo"),
        ("runs/student", None),
        ("/x/base", None),
    ):
        assert hub_name(name) == base


@pytest.mark.parametrize("format", ["transformers", "openai", "ctranslate2"])
def test_the_first_use_of_each_card_runs(exported, format, monkeypatch, capsys, tmp_path):
    """Without FFmpeg. Cut down: random numbers write on to the end of the context, at six
    temperatures."""
    import faster_whisper
    import transformers
    import whisper

    limits = dict(transformers={}, openai=dict(sample_len=4), ctranslate2=dict(max_new_tokens=4))
    fast = faster_whisper.WhisperModel.transcribe
    quick = dict(limits[format], temperature=0.0)
    monkeypatch.setattr(transformers, "pipeline", partial(transformers.pipeline, max_new_tokens=4))
    monkeypatch.setattr(
        whisper.model.Whisper, "transcribe", partialmethod(whisper.transcribe, **quick)
    )
    monkeypatch.setattr(faster_whisper.WhisperModel, "transcribe", partialmethod(fast, **quick))
    soundfile.write(tmp_path / "speech.wav", synthetic_clip()[:32_000], 16_000)
    monkeypatch.chdir(tmp_path)
    code = (exported[format] / "README.md").read_text().split("```")[1].removeprefix("python\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setenv("PATH", "")
        exec(code, {})
    assert capsys.readouterr().out.strip()


def test_what_cannot_work_is_refused_before_anything_is_written(random_folders, tmp_path):
    config = ExportConfig(str(random_folders[1]), tmp_path / "out", ("openai",))
    for wrong, complaint in (
        (dict(verify=True), "add transformers"),
        (dict(verify_audio=tmp_path / "a.wav"), "add --verify"),
        (dict(format=()), "at least one format"),
        (dict(output_dir=tmp_path / "a" / "out"), r"cannot write to .*a: choose"),
        (dict(output_dir=random_folders[1]), "model.safetensors, a model in transformers format"),
    ):
        (tmp_path / "a").touch()
        with pytest.raises(InputError, match=complaint):
            run(replace(config, **wrong))
    assert not (tmp_path / "out").exists()


def test_a_padded_vocabulary_is_cut_and_added_words_have_no_other_form(
    random_folders, student, tmp_path
):
    """openai-whisper and CTranslate2 take all ids behind <|notimestamps|> for times."""
    decoder = student.params["decoder"]
    embedding = decoder["tokens"]["embedding"]
    more = {"tokens": {"embedding": np.concatenate([embedding, embedding[:8]])}}
    dims = replace(student.dims, vocab=51_872)
    padded = replace(student, dims=dims, params=student.params | {"decoder": decoder | more})
    save_checkpoint(padded, tmp_path / "padded")
    every = ("transformers", "openai", "ctranslate2")
    folders = run(ExportConfig(str(tmp_path / "padded"), tmp_path / "out", every))
    for name, vocab in zip(every, (51_872, 51_864, 51_864), strict=True):
        assert load_checkpoint(folders[name]).dims.vocab == vocab
    assert same_arrays(load_checkpoint(folders["openai"]).params, student.params)

    unknown = replace(padded, source=tmp_path)
    with pytest.raises(InputError, match=r"English-only model has 51,872 tokens.*no tokenizer"):
        formats.without_padding(unknown)
    tokenizer = json.loads((tmp_path / "padded" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 51_864, "content": " poundkey", "special": False})
    (tmp_path / "padded" / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = run(ExportConfig(str(tmp_path / "padded"), tmp_path / "words"))["transformers"]
    assert load_checkpoint(words).tokens().words == {51_864: " poundkey"}
    for name in every[1:]:
        with pytest.raises(InputError, match=r"1 added tokens behind.*transformers alone"):
            run(ExportConfig(str(tmp_path / "padded"), tmp_path / name, (name,)))
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(("name", "key"), formats.KEYS.items())
def test_an_export_that_stops_leaves_no_mixed_model(
    random_folders, tmp_path, monkeypatch, name, key
):
    config = ExportConfig(str(random_folders[1]), tmp_path / "out", (name,))
    run(config)
    real, done = Path.replace, []

    def stop(source, target):
        done.append(Path(target).name)
        if len(done) == 3:
            raise OSError("stopped")
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(InputError, match="could not be written: stopped"):
            run(replace(config, dtype="float16"))
    assert key not in done
    assert not (tmp_path / "out" / key).exists()
    run(config)
    assert (tmp_path / "out" / key).exists()


def test_a_folder_may_be_written_again(random_folders, tmp_path):
    for name, weights in (("openai", "model.pt"), ("ctranslate2", "")):
        folder = tmp_path / name
        run(ExportConfig(str(random_folders[1]), folder, (name,)))
        again = run(ExportConfig(str(folder / weights), folder, (name,), dtype="float16"))
        assert load_checkpoint(again[name] / weights).dims.decoder_layers == 1


@pytest.mark.parametrize("content", ["[]", "{", '{"models": [{"name": "x"}]}', None])
def test_a_report_that_is_none_is_refused_before_anything_is_written(
    content, random_folders, tmp_path
):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    config = ExportConfig(str(random_folders[1]), tmp_path / "out", report=tmp_path / "report.json")
    with pytest.raises(InputError, match=r"report\.json"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_alignment_heads_point_at_layers_the_student_has(exported):
    generation = json.loads((exported["transformers"] / "generation_config.json").read_text())
    assert generation["alignment_heads"]
    assert all(layer < 1 for layer, _ in generation["alignment_heads"])


def test_alignment_heads_are_chosen_by_the_teachers_on_speech(
    random_folders, base_folder, tmp_path, human_clips
):
    (tmp_path / "speech").mkdir()
    for index, (sound, _) in enumerate(human_clips[:3]):
        soundfile.write(tmp_path / "speech" / f"{index}.wav", sound, 16_000)
    config = ExportConfig(
        str(random_folders[1]),
        tmp_path / "out",
        heads_of=str(random_folders[0]),
        heads_on=str(tmp_path / "speech"),
    )
    chosen = load_checkpoint(run(config)["transformers"]).generation["alignment_heads"]
    student = load_checkpoint(random_folders[1])
    every = student.dims.decoder_layers * student.dims.decoder_heads
    assert 0 < len(chosen) <= every
    assert all(layer < student.dims.decoder_layers for layer, _ in chosen)
    with pytest.raises(InputError, match="belong together"):
        run(replace(config, heads_on=None))
    with pytest.raises(InputError, match="same tokenizer"):
        run(replace(config, heads_of=str(base_folder)))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError):
        run(replace(config, heads_on=str(tmp_path / "nothing")))
