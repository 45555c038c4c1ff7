"""What a student tells of language and silence, trained on real speech of five languages.

The teacher is whisper-base, the student its encoder and two of its six decoder layers; clips that
are judged on are not among those that are trained on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_speech import FOREIGN, foreign_prompts

from flax_distil.audio.load import AudioError, encode_flac, load_audio
from flax_distil.cache import cache_folder
from flax_distil.config import (
    ComputeConfig,
    DataConfig,
    DistillConfig,
    FilterConfig,
    InitStudentConfig,
    OptimizerConfig,
    PseudoLabelConfig,
    RunConfig,
)
from flax_distil.decode.recognizer import make_recognizer
from flax_distil.distill.runs import trained_student
from flax_distil.evaluate.agreement import Agreement, agreement
from flax_distil.fetch.speech import human_prompts, read_manifest
from flax_distil.model import student
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.pseudo_label import filter as filtering
from flax_distil.pseudo_label import labeller
from flax_distil.recipe import save_recipe

LANGUAGES = ("en", *FOREIGN)
NOISES = ("silence", "white noise", "brown noise")
TRAINED, HELD_OUT = 16, 12  # clips of each language
SHORT, LONG = (3, 5), (5, 10)  # seconds of those; the teacher is unsure of shorter ones itself
NOISE_TRAINED = 6  # clips of each noise
RATE = 16_000


def prompts(language: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Telephone prompts to train on, and others to judge on, in a seeded order."""
    speech = cache_folder() / "demo-speech"
    if language == "en":
        manifest = human_prompts(speech / "human")
        clips = read_manifest(manifest) if manifest else []
        paths = [manifest.parent / c.audio_filepath for c in clips if c.speaker == "allison"]
    else:
        paths = foreign_prompts(language, speech / "foreign") or []
    if not paths:
        pytest.skip("there are no Debian packages here, out of which the speech comes")
    trained, held_out = [], []
    for place in np.random.default_rng(0).permutation(len(paths)):
        path = paths[place]
        try:
            waveform = load_audio(path, format="g722" if path.suffix == ".g722" else None)
        except AudioError:  # a few prompts have no sound
            continue
        for clips, size, (least, most) in ((trained, TRAINED, SHORT), (held_out, HELD_OUT, LONG)):
            if len(clips) < size and least * RATE <= len(waveform) < most * RATE:
                clips.append(waveform)
    return trained, held_out


def noise(kind: str, random: np.random.Generator) -> np.ndarray:
    """1 to 8 s at -50 to -10 dB."""
    samples = random.normal(size=round(RATE * random.uniform(1, 8)))
    if kind == "silence":
        return np.zeros(len(samples), np.float32)
    if kind == "brown noise":
        samples = np.cumsum(samples)
        samples -= np.linspace(samples[0], samples[-1], len(samples))
    samples /= np.abs(samples).max()
    return (samples * 10 ** random.uniform(-2.5, -0.5)).astype(np.float32)


def held_out_agreement(teacher: Path, folder: Path) -> Agreement:
    """How near the student is to its teacher on clips that were held out."""
    random = np.random.default_rng(1)
    rows, held_out = [], []

    def write(name: str, clips: list[np.ndarray], **about) -> None:
        for number, clip in enumerate(clips):
            path = folder / f"{name}-{number}.flac"
            path.write_bytes(encode_flac(clip))
            rows.append({"audio": path.name, "duration": len(clip) / RATE, **about})

    for code in LANGUAGES:
        trained, others = prompts(code)
        write(code, trained, language=code)
        held_out += others
    for kind in NOISES:
        write(kind, [noise(kind, random) for _ in range(NOISE_TRAINED)], speech=False)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = (load_checkpoint(str(teacher)), train(teacher, folder))
    return agreement(*(make_recognizer(one, "float32") for one in models), held_out)


def train(teacher: Path, folder: Path):
    """The student, after the road that a user takes: label, filter, make it, train it."""
    labeller.run(
        PseudoLabelConfig(
            DataConfig(str(folder / "train.jsonl")),
            str(teacher),
            folder / "labels",
            timestamps=False,
            teacher_states=True,
            audio_states=folder / "states",
            max_tokens=40,
            batch_size=8,
        )
    )
    filtering.run(
        FilterConfig(
            folder / "labels",
            folder / "filtered",
            max_wer=None,
            keep_non_speech=True,
            allow_missing_reference=True,
        )
    )
    student.run(InitStudentConfig(str(teacher), folder / "student"))
    recipe = folder / "recipe.toml"
    save_recipe(
        DistillConfig(
            str(teacher),
            str(folder / "student"),
            folder / "run",
            labels=(folder / "filtered",),
            batch_size=4,
            prompt_probability=0.0,
            label_buckets=(48,),
            audio_states=folder / "states",
            stored_teacher=True,
            non_speech_share=0.15,
            optimizer=OptimizerConfig(steps=200, learning_rate=3e-4, warmup_steps=20),
            compute=ComputeConfig(dtype="float32", vocabulary_chunk=96),
            run=RunConfig(tensorboard=False, log_every=50),
        ),
        recipe,
    )
    # On one device: eight pretended ones take eight times the memory.
    command = [Path(sys.executable).parent / "flax-distil", "distill", "--recipe", recipe]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return trained_student(folder / "run", "latest")[1]


def test_language_and_no_speech_are_the_teachers(base_folder, tmp_path):
    """The same likeliest language on 95 % of the held-out clips; the probability of no speech
    within 0.15 by the median over clips of speech, over silence and over noise."""
    found = held_out_agreement(base_folder, tmp_path)
    assert found.language is not None
    assert found.language >= 0.95, found
    assert max(found.no_speech.values()) < 0.15, found
