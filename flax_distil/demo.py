"""Every stage once, with real weights and real speech.

fetch → label → filter → init-student → distill → export → evaluate → transcribe
"""

import dataclasses
import logging
import time
from pathlib import Path

from rich.console import Console

from flax_distil import config, export
from flax_distil.config import DataConfig, DemoConfig
from flax_distil.data.utterances import load_waveform, read_dataset
from flax_distil.distill import trainer
from flax_distil.distill.flops import measured_peak
from flax_distil.errors import Stopped, check_writable
from flax_distil.evaluate import Report, evaluator
from flax_distil.export.verify import differing_texts
from flax_distil.fetch.speech import DemoSpeech, demo_speech
from flax_distil.fetch.weights import fetch_weights
from flax_distil.model import student
from flax_distil.parallel.mesh import make_mesh
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import labeller
from flax_distil.recipe import load_recipe, save_recipe
from flax_distil.transcription.recordings import transcribe

log = logging.getLogger(__name__)

# FLOP/s in float32 matrix products with which the whole demo takes a quarter of an hour;
# whisper-base's is estimated from its size, not measured.
FULL_SPEED = {"whisper-tiny.en": 4e11, "whisper-base": 1e12}


def run(demo: DemoConfig) -> Report:
    """Train and evaluate a student on this machine; everything is written to `output_dir`.

    If it is stopped and started again, it resumes: speech, labels and training are kept.

    Raises Stopped where training was asked to stop before its end.
    """
    check_writable(demo.output_dir)
    start, demo, folder, console = time.monotonic(), scaled(demo), demo.output_dir, Console()
    console.rule("1. Fetch the teacher and speech", align="left")
    teacher = fetch_weights(demo.teacher)
    speech = demo_speech(
        folder / "speech",
        demo.seed,
        demo.sentences,
        heldout_spoken=demo.heldout,
        heldout_prompts=demo.heldout,
        non_speech=demo.non_speech,
    )
    log.info("speech: %s", speech.sources)
    console.rule("2. Label and filter", align="left")
    labels = label(demo, speech, teacher)
    console.rule("3. Initialise the student: encoder and two decoder layers", align="left")
    untrained, trained = folder / "student-untrained", folder / "student"
    student.run(config.InitStudentConfig(str(teacher), untrained))
    console.rule("4. Distil", align="left")
    distilled = train(demo, teacher, untrained, labels)
    console.rule("5. Export to Transformers, verified in PyTorch", align="left")
    clip = Path(str(next(iter(read_dataset(heldout(speech)[0]).iter_from(0))).audio))
    export.run(config.ExportConfig(str(distilled), trained, verify=True, verify_audio=clip))
    console.rule("6. Evaluate on held-out clips", align="left")
    models = {"teacher": teacher, "untrained": untrained, "student": trained}
    report = evaluate(demo, speech, models)
    text = transcribe(clip, trained).text.strip()
    console.print(f"\n{clip.name}, transcribed by the exported student: {text}")
    report.print(console)
    for key, value in report.settings.items():
        console.print(f"{key}: {value}", highlight=False)
    log.info("done in %.1f minutes: see %s", (time.monotonic() - start) / 60, folder)
    return report


def scaled(demo: DemoConfig) -> DemoConfig:
    """The demo reduced to what this machine can do in a quarter of an hour.

    The share is kept in recipe.toml, so that a second start resumes with the same.
    """
    kept, share = demo.output_dir / "recipe.toml", demo.share
    if share is None and kept.is_file():
        share = load_recipe(kept, DemoConfig).share
    if share is None:
        speed = measured_peak(make_mesh(), "float32")
        share = min(1.0, round(speed / FULL_SPEED[demo.teacher], 2))
    if share < 1:
        log.info("using %.0f %% of the demo's speech and updates, to be done in time", 100 * share)
    whole = dataclasses.replace(demo, share=share)
    save_recipe(whole, kept)
    names = ("sentences", "clips", "single", "non_speech", "steps")
    sizes = {name: max(1, round(share * getattr(demo, name))) for name in names}
    return dataclasses.replace(whole, **sizes)


def label(demo: DemoConfig, speech: DemoSpeech, teacher: Path) -> tuple[Path, ...]:
    """Filtered label stores of packed windows with timestamps, as in long recordings, of single
    clips without, and of silence and noise: students learn all three."""
    packed = config.PseudoLabelConfig(
        DataConfig(str(speech.train), limit=demo.clips, language="en"),
        model=str(teacher),
        output_dir=demo.output_dir / "labels" / "packed",
        pack_seconds=25.0,
        max_tokens=demo.max_tokens,
        batch_size=8,
        shard_size=64,
        teacher_states=True,
        audio_states=demo.output_dir / "audio-states",
    )
    clips = {
        "single": DataConfig(str(speech.train), limit=demo.single, language="en"),
        "non-speech": DataConfig(str(speech.non_speech), language="en", speech=False),
    }
    runs = [packed]
    for name, data in clips.items():
        store = demo.output_dir / "labels" / name
        of_clips = {"data": data, "output_dir": store, "timestamps": False, "pack_seconds": None}
        runs.append(dataclasses.replace(packed, **of_clips))
    filtered = []
    for one in runs:
        labeller.run(one)
        filtered.append(demo.output_dir / "filtered" / one.output_dir.name)
        filtering.run(
            config.FilterConfig(one.output_dir, filtered[-1], overwrite=True, keep_non_speech=True)
        )
    return tuple(filtered)


def train(demo: DemoConfig, teacher: Path, student: Path, labels: tuple[Path, ...]) -> Path:
    """Train the student; returns the run's folder. Raises Stopped before the last update."""
    folder = demo.output_dir / "distill"
    summary = trainer.run(
        config.DistillConfig(
            teacher=str(teacher),
            student=str(student),
            labels=labels,
            output_dir=folder,
            batch_size=demo.batch_size,
            language="en",
            prompt_probability=0.0,  # clips are evaluated without a prompt
            timestamp_probability=1.0,  # stored states are those of whole labels
            non_speech_share=demo.non_speech_share,
            label_buckets=(96, demo.max_tokens + 2),
            audio_states=demo.output_dir / "audio-states",
            stored_teacher=True,
            seed=demo.seed,
            optimizer=config.OptimizerConfig(
                demo.steps, learning_rate=demo.learning_rate, warmup_steps=demo.steps // 10
            ),
            compute=config.ComputeConfig(dtype="float32", vocabulary_chunk=128),
            validation=config.ValidationConfig(every=demo.steps + 1),
            run=config.RunConfig(resume="auto", save_every=20, log_every=10),
        )
    )
    if not summary.finished:
        raise Stopped(
            f"training was stopped at update {summary.steps} of {demo.steps} and is saved in "
            f"{folder}: start the demo again with --output-dir {demo.output_dir} to continue"
        )
    return folder


def evaluate(demo: DemoConfig, speech: DemoSpeech, models: dict[str, Path]) -> Report:
    """Teacher and student on synthetic and human speech, clip by clip and as one recording, and on
    clips without speech; also the untrained student's error rate, and how often PyTorch's texts are
    the student's."""
    sets, both = heldout(speech), ("teacher", "student")
    common = config.EvaluateConfig(
        (str(models["untrained"]),), tuple(map(str, sets)), max_tokens=demo.max_tokens
    )
    untrained = evaluator.evaluate_models(common)
    report = evaluator.evaluate_models(
        dataclasses.replace(
            common,
            models=tuple(str(models[name]) for name in both),
            names=both,
            methods=("sequential",),
            join=demo.join,
            non_speech=demo.heldout_non_speech,
            run=demo.output_dir / "distill",
        )
    )
    clips = [load_waveform(one) for source in sets for one in read_dataset(source).iter_from(0)]
    same = len(clips) - len(differing_texts(models["student"], clips, demo.max_tokens))
    details = {
        "speech": speech.sources,
        "untrained student": f"error rate {untrained.models[0]['wer']:.1f} %",
        "in PyTorch": f"{same} of {len(clips)} of the student's texts are the same",
    }
    report = dataclasses.replace(report, settings=report.settings | details)
    report.save(demo.output_dir)
    return report


def heldout(speech: DemoSpeech) -> list[Path]:
    """Manifests of the held-out clips, human ones first where there are any."""
    return [path for path in (speech.heldout_human, speech.heldout_synthetic) if path]
