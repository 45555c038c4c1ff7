"""Every stage once, with real weights and real speech.

fetch → label → filter → init-student → distill → export → evaluate → transcribe
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Literal

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

# FLOP/s in float32 matrix products with which the whole demo takes a quarter of an hour;
# whisper-base's is estimated from its size, not measured.
FULL_SPEED = {"whisper-tiny.en": 4e11, "whisper-base": 1e12}


def run(config: DemoConfig) -> Report:
    """Train and evaluate a student on this machine; everything is written to `output_dir`.

    If it is stopped and started again, it resumes: speech, labels and training are kept.

    Raises Stopped where training was asked to stop before its end.
    """
    check_writable(config.output_dir)
    start, config, folder = time.monotonic(), scaled(config), config.output_dir
    step("1. Fetch the teacher and speech")
    teacher = fetch_weights(config.teacher)
    speech = demo_speech(
        folder / "speech",
        config.seed,
        config.sentences,
        heldout_spoken=config.heldout,
        heldout_prompts=config.heldout,
        non_speech=config.non_speech,
    )
    log.info("speech: %s", speech.sources)
    step("2. Label")
    stores = [label(config, speech, teacher, kind) for kind in ("packed", "single", "non-speech")]
    step("3. Filter")
    filtered = tuple(filter_labels(store) for store in stores)
    step("4. Initialise the student: the teacher's encoder and two of its decoder layers")
    untrained = folder / "student-untrained"
    student.run(InitStudentConfig(str(teacher), untrained))
    step("5. Distil")
    run_folder = train(config, speech, teacher, untrained, filtered)
    step("6. Export to Transformers, verified in PyTorch")
    trained = folder / "student"
    clip = Path(str(next(iter(read_dataset(heldout(speech)[0]).iter_from(0))).audio))
    export.run(ExportConfig(str(run_folder), trained, verify=True, verify_audio=clip))
    step("7. Evaluate on held-out clips")
    models = {"teacher": teacher, "untrained": untrained, "student": trained}
    report = evaluate(config, speech, models)
    text = transcribe(clip, trained).text.strip()
    console = Console()
    console.print(f"\n{clip.name}, transcribed by the exported student: {text}")
    console.print(report.table())
    for key, value in report.settings.items():
        console.print(f"{key}: {value}", highlight=False)
    log.info("done in %.1f minutes: see %s", (time.monotonic() - start) / 60, folder)
    return report


def scaled(config: DemoConfig) -> DemoConfig:
    """The demo reduced to what this machine can do in a quarter of an hour.

    The share is kept in recipe.toml, so that a second start resumes with the same.
    """
    kept, share = config.output_dir / "recipe.toml", config.share
    if share is None and kept.is_file():
        share = load_recipe(kept, DemoConfig).share
    if share is None:
        speed = measured_peak(make_mesh(), "float32")
        share = min(1.0, round(speed / FULL_SPEED[config.teacher], 2))
    if share < 1:
        log.info("using %.0f %% of the demo's speech and updates, to be done in time", 100 * share)
    whole = dataclasses.replace(config, share=share)
    save_recipe(whole, kept)
    return dataclasses.replace(
        whole,
        **{
            name: max(1, round(share * getattr(config, name)))
            for name in ("sentences", "clips", "single", "non_speech", "steps")
        },
    )


def label(
    config: DemoConfig,
    speech: DemoSpeech,
    teacher: Path,
    kind: Literal["packed", "single", "non-speech"],
) -> Path:
    """A label store of packed windows with timestamps, as in long recordings, of single clips
    without, or of silence and noise: students learn all three."""
    folder, packed = config.output_dir / "labels" / kind, kind == "packed"
    data = DataConfig(
        str(speech.train), limit=config.clips if packed else config.single, language="en"
    )
    if kind == "non-speech":
        data = DataConfig(str(speech.non_speech), language="en", speech=False)
    labeller.run(
        PseudoLabelConfig(
            data,
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


def filter_labels(store: Path) -> Path:
    """The label store with the labels below the paper's threshold, and all clips without speech."""
    folder = store.parent.parent / "filtered" / store.name
    filtering.run(FilterConfig(store, folder, overwrite=True, keep_non_speech=True))
    return folder


def train(
    config: DemoConfig, speech: DemoSpeech, teacher: Path, student: Path, filtered: tuple[Path, ...]
) -> Path:
    """Train the student; returns the run's folder. Raises Stopped before the last update."""
    folder = config.output_dir / "distill"
    summary = trainer.run(
        DistillConfig(
            teacher=str(teacher),
            student=str(student),
            labels=filtered,
            output_dir=folder,
            batch_size=config.batch_size,
            language="en",
            prompt_probability=0.0,  # clips are evaluated without a prompt
            timestamp_probability=1.0,  # stored states are those of whole labels
            non_speech_share=config.non_speech_share,
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


def evaluate(config: DemoConfig, speech: DemoSpeech, models: dict[str, Path]) -> Report:
    """All models on synthetic and human speech, clip by clip and as one recording; also how often
    PyTorch's texts are the student's, and how near its language and no-speech probabilities are to
    its teacher's."""
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
    details = {"speech": speech.sources, "in PyTorch": same}
    ours, theirs = (
        make_recognizer(load_checkpoint(models[name])) for name in ("student", "teacher")
    )
    for source in sets:
        rates = (
            f"{name} {wer_as_one_recording(config, recognizer, source):.1f}"
            for name, recognizer in (("teacher", theirs), ("student", ours))
        )
        details[f"WER of {source.stem} as one recording, sequential method"] = ", ".join(rates)
    details["student and teacher"] = str(agreement(theirs, ours, clips, seed=config.seed))
    report = dataclasses.replace(report, settings=report.settings | details)
    report.save(config.output_dir)
    return report


def wer_as_one_recording(config: DemoConfig, recognizer: Recognizer, source: Path) -> float:
    """WER in percent of a manifest's clips, joined to one recording."""
    utterances = list(read_dataset(source).iter_from(0))
    pause = np.zeros(round(config.pause * SAMPLE_RATE), np.float32)
    parts = [part for one in utterances for part in (load_waveform(one), pause)]
    text = transcribe(np.concatenate(parts), recognizer, language="en").text
    normalize = normalizer("en")
    reference = " ".join(normalize(one.text or "") for one in utterances)
    return 100 * word_errors([reference], [normalize(text)]).rate


def heldout(speech: DemoSpeech) -> list[Path]:
    """Manifests of the held-out clips, human ones first where there are any."""
    return [path for path in (speech.heldout_human, speech.heldout_synthetic) if path]


def step(title: str) -> None:
    """Print the title of a step."""
    Console().rule(title, align="left")
