"""A teacher that hears the number of a clip in its pitch.

As a program it labels, killed with SIGKILL at random instants until it is done:

    python fake_teacher.py MANIFEST OUTPUT KILLS
"""

import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from flax_distil.audio.load import encode_flac
from flax_distil.config import DataConfig, PseudoLabelConfig
from flax_distil.decode.search import Hypothesis
from flax_distil.errors import InputError
from flax_distil.pseudo_label.jobs import LabelJob, settings, windows
from flax_distil.pseudo_label.labeller import Engine, LabelSummary, label
from flax_distil.pseudo_label.shards import label_shards
from flax_distil.pseudo_label.store import SCHEMA, open_store
from flax_distil.text.languages import to_language_code
from flax_distil.text.normalize import normalizer
from flax_distil.text.wer import word_errors


def clip(number: int, seconds: float = 0.1) -> bytes:
    """FLAC of a tone of 200 + 100 · number Hz."""
    time_n = np.arange(round(16_000 * seconds)) / 16_000
    pitch = 200 + 100 * number
    return encode_flac((0.3 * np.sin(2 * np.pi * pitch * time_n)).astype(np.float32))


def fake_teacher(waveforms_BN: np.ndarray, language: str | None) -> list[Hypothesis]:
    """ "clip number n" for each row."""
    spectra = np.abs(np.fft.rfft(waveforms_BN[:, :1600].astype(np.float64)))  # 10 Hz a bin
    numbers = (spectra.argmax(axis=1) * 10 - 200) // 100
    return [
        Hypothesis(
            tokens=(1, 2, int(number)),
            text=f" clip number {number}",
            language=language or "en",
            mean_log_probability=-float(number) / 10,
            no_speech_probability=0.125,
            compression_ratio=1.5,
        )
        for number in numbers
    ]


def lacks_unknown(language: str | None) -> str | None:
    """Of a teacher for all languages of Whisper."""
    try:
        return None if language is None or to_language_code(language) else ""
    except InputError as error:
        return str(error)


def idle_teacher(waveforms_BN, language):
    raise AssertionError("nothing is left to label")


class FakeLabeller(NamedTuple):
    """A job and the engine that labels its shards."""

    job: LabelJob
    shards: Engine


def label_with(
    config: PseudoLabelConfig, teacher=fake_teacher, states=None, lacks=lacks_unknown
) -> LabelSummary:
    """`run` with this teacher in place of a Whisper."""
    labeller = fake_labeller(config, teacher, states, lacks)
    return label(labeller.job, labeller.shards)


def fake_labeller(
    config: PseudoLabelConfig,
    teacher=fake_teacher,
    states=None,
    lacks=lacks_unknown,
    utterances=None,
) -> FakeLabeller:
    """A labeller for a configuration's dataset, or these utterances in its place."""
    utterances = windows(config) if utterances is None else utterances
    store = open_store(config.output_dir, settings(config, utterances, "fake", 51864))
    job = LabelJob(config, utterances, store, states, lacks)
    return FakeLabeller(job, partial(label_shards, job, teacher))


def label_telling(manifest: str, output: str, began: int) -> None:
    """23 clips in 23 shards; writes to the pipe `began` when a shard's last text is there."""

    def telling(waveforms_BN, language):
        hypotheses = fake_teacher(waveforms_BN, language)
        os.write(began, b"1")
        return hypotheses

    data, folder = DataConfig(manifest), Path(output)
    config = PseudoLabelConfig(
        data=data, model="fake", output_dir=folder, batch_size=2, shard_size=1, workers=2
    )
    label_with(config, telling)


def label_killed(manifest: str, output: str, kills: int) -> None:
    """Label in child processes, all but the last killed at a random instant.

    Every third kill hits the start, the others the work itself: at any point of writing a shard
    or hearing the next.
    Prints how each child ended and how many shards lay there then.
    """
    # What loads when it is first used is loaded here, once, and not by each child.
    word_errors([normalizer("en")("a")], ["b"])
    pa.Table.from_pylist([{}], schema=SCHEMA)
    chance = random.Random(0)
    for attempt in range(kills + 1):
        waiting, began = os.pipe()
        child = os.fork()  # nothing here has started a thread yet
        if not child:
            label_telling(manifest, output, began)
            os._exit(0)
        os.close(began)
        if attempt < kills:
            if attempt % 3:
                for _ in range(chance.randint(1, 2)):  # so that a slow machine gets on as well
                    os.read(waiting, 1)
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(waiting)
        shards = len(list((Path(output) / "data").glob("[0-9]*.parquet")))
        print(os.waitstatus_to_exitcode(status), shards)


if __name__ == "__main__":
    label_killed(sys.argv[1], sys.argv[2], int(sys.argv[3]))
