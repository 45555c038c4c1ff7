"""The whole road once, on real weights and real speech: what `make demo` walks.

fetch → label → filter → init-student → distill → export → evaluate → transcribe
"""

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from flax_distil import export
from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DemoConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    FilterConfig,
    InitStudentConfig,
    OptimizerConfig,
    PseudoLabelConfig,
    RunConfig,
    ValidationConfig,
)
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.decode.recognizer import Recognizer, make_recognizer
from flax_distil.distill import trainer
from flax_distil.distill.flops import measured_peak
from flax_distil.errors import Stopped, check_writable
from flax_distil.evaluate import Report
from flax_distil.evaluate.agreement import agreement
from flax_distil.evaluate.evaluator import evaluate_models
from flax_distil.export.verify import differing_texts
from flax_distil.fetch.speech import DemoSpeech, demo_speech
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model import student
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.parallel.mesh import make_mesh
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import labeller
from flax_distil.recipe import load_recipe, save_recipe
from flax_distil.text.normalize import normalizer
from flax_distil.text.wer import word_errors
from flax_distil.transcribe import transcribe

log = logging.getLogger(__name__)

# FLOP/s in float32 matrix products at which the whole demo is done in time; whisper-base's is
# estimated from its size and was not measured.
FULL_SPEED = {"whisper-tiny.en": 4e11, "whisper-base": 1e12}


def run(config: DemoConfig) -> Report:
    """Teach a student on this machine and judge it; all of it lands in `output_dir`.

    Stopped at any point and started again, it goes on: speech, labels and training are kept.
    """
    check_writable(config.output_dir)
    start, config, folder = time.monotonic(), fitted(config), config.output_dir
    step("1. A teacher and speech")
    teacher = fetch_weights(config.teacher)
    speech = demo_speech(
        folder / "speech",
        config.seed,
        config.sentences,
        heldout_spoken=config.heldout,
        heldout_prompts=config.heldout,
    )
    log.info("speech: %s", speech.sources)
    step("2. The teacher writes down what it hears")
    stores = [label(config, speech, teacher, packed) for packed in (True, False)]
    step("3. Labels that can be trusted")
    filtered = tuple(keep_reliable(store) for store in stores)
    step("4. A student of the teacher's encoder and two of its decoder layers")
    untrained = folder / "student-untrained"
    student.run(InitStudentConfig(str(teacher), untrained))
    step("5. Distillation")
    run_folder = teach(config, speech, teacher, untrained, filtered)
    step("6. A folder for Transformers, checked in PyTorch")
    trained = folder / "student"
    clip = Path(str(next(iter(read_dataset(heldout(speech)[0]).iter_from(0))).audio))
    export.run(ExportConfig(str(run_folder), trained, verify=True, verify_audio=clip))
    step("7. Judged on clips that nobody was trained on")
    models = {"teacher": teacher, "untrained": untrained, "student": trained}
    report = judge(config, speech, models)
    said = transcribe(clip, trained).text.strip()
    console = Console()
    console.print(f"\n{clip.name}, as the exported student hears it: {said}")
    console.print(report.table())
    for key, value in report.settings.items():
        console.print(f"{key}: {value}", highlight=False)
    log.info("%.1f minutes; all of it is in %s", (time.monotonic() - start) / 60, folder)
    return report


def fitted(config: DemoConfig) -> DemoConfig:
    """The demo cut to what this machine should do in a quarter of an hour.

    What was decided once stands in recipe.toml, so that a second start goes on with the same.
    """
    kept, share = config.output_dir / "recipe.toml", config.share
    if share is None and kept.is_file():
        share = load_recipe(kept, DemoConfig).share
    if share is None:
        speed = measured_peak(make_mesh(), "float32")
        share = min(1.0, round(speed / FULL_SPEED[config.teacher], 2))
    if share < 1:
        log.info("%.0f %% of the demo's speech and updates, to be done in time", 100 * share)
    whole = dataclasses.replace(config, share=share)
    save_recipe(whole, kept)
    return dataclasses.replace(
        whole,
        **{
            name: max(1, round(share * getattr(config, name)))
            for name in ("sentences", "clips", "single", "steps")
        },
    )


def label(config: DemoConfig, speech: DemoSpeech, teacher: Path, packed: bool) -> Path:
    """A label store of windows full of speech with timestamps, as long recordings are read, or of
    single clips without: students learn both."""
    folder = config.output_dir / "labels" / ("packed" if packed else "single")
    labeller.run(
        PseudoLabelConfig(
            DataConfig(
                str(speech.train), limit=config.clips if packed else config.single, language="en"
            ),
            model=str(teacher),
            output_dir=folder,
            timestamps=packed,
            pack_seconds=25.0 if packed else None,
            max_tokens=config.max_tokens,
            batch_size=8,
            shard_size=64,
            teacher_states=True,
            audio_states=config.output_dir / "audio-states",
        )
    )
    return folder


def keep_reliable(store: Path) -> Path:
    """The labels below the paper's threshold."""
    folder = store.parent.parent / "filtered" / store.name
    filtering.run(FilterConfig(store, folder, overwrite=True))
    return folder


def teach(
    config: DemoConfig, speech: DemoSpeech, teacher: Path, student: Path, filtered: tuple[Path, ...]
) -> Path:
    """The run's folder. Raises Stopped where training was asked to stop before its end."""
    folder = config.output_dir / "distill"
    summary = trainer.run(
        DistillConfig(
            teacher=str(teacher),
            student=str(student),
            labels=filtered,
            output_dir=folder,
            batch_size=config.batch_size,
            language="en",
            prompt_probability=0.0,  # clips are judged without a prompt
            timestamp_probability=1.0,  # where there are any: stored states are of whole labels
            label_buckets=(96, config.max_tokens + 2),
            audio_states=config.output_dir / "audio-states",
            stored_teacher=True,
            seed=config.seed,
            optimizer=OptimizerConfig(
                config.steps, learning_rate=config.learning_rate, warmup_steps=config.steps // 10
            ),
            compute=ComputeConfig(dtype="float32", vocabulary_chunk=128),
            validation=ValidationConfig(every=config.steps + 1),
            run=RunConfig(resume="auto", save_every=20, log_every=10),
        )
    )
    if not summary.finished:
        raise Stopped(
            f"training was stopped at update {summary.steps} of {config.steps} and is saved in "
            f"{folder}: start the demo again with --output-dir {config.output_dir} to continue"
        )
    return folder


def judge(config: DemoConfig, speech: DemoSpeech, models: dict[str, Path]) -> Report:
    """All models side by side, synthetic and human speech apart, by both methods; the student in
    PyTorch, and its language and no-speech answers beside its teacher's."""
    sets = heldout(speech)
    report = evaluate_models(
        EvaluateConfig(
            models=tuple(map(str, models.values())),
            names=tuple(models),
            datasets=tuple(map(str, sets)),
            max_tokens=config.max_tokens,
        )
    )
    clips = [
        load_waveform(utterance)
        for source in sets
        for utterance in read_dataset(source).iter_from(0)
    ]
    differing = differing_texts(models["student"], clips, config.max_tokens)
    same = f"{len(clips) - len(differing)} of {len(clips)} of the student's texts are the same"
    told = {"speech": speech.sources, "in PyTorch": same}
    ours, theirs = (
        make_recognizer(load_checkpoint(models[name])) for name in ("student", "teacher")
    )
    for source in sets:
        rates = (
            f"{name} {read_as_one(config, recognizer, source):.1f}"
            for name, recognizer in (("teacher", theirs), ("student", ours))
        )
        told[f"WER of {source.stem} as one recording, sequential method"] = ", ".join(rates)
    told["student and teacher"] = str(agreement(theirs, ours, clips, seed=config.seed))
    report = dataclasses.replace(report, settings=report.settings | told)
    report.save(config.output_dir)
    return report


def read_as_one(config: DemoConfig, recognizer: Recognizer, source: Path) -> float:
    """WER in percent of the clips of a manifest, joined and transcribed as a user's recording."""
    utterances = list(read_dataset(source).iter_from(0))
    pause = np.zeros(round(config.pause * SAMPLE_RATE), np.float32)
    parts = [part for one in utterances for part in (load_waveform(one), pause)]
    text = transcribe(np.concatenate(parts), recognizer, language="en").text
    normalize = normalizer("en")
    reference = " ".join(normalize(one.text or "") for one in utterances)
    return 100 * word_errors([reference], [normalize(text)]).rate


def heldout(speech: DemoSpeech) -> list[Path]:
    """Manifests of the clips that are kept for judging, human ones first where there are any."""
    return [path for path in (speech.heldout_human, speech.heldout_synthetic) if path]


def step(title: str) -> None:
    """Says what comes now."""
    Console().rule(title, align="left")
