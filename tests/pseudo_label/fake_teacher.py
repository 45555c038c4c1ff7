"""A teacher that hears the number of a clip in its pitch.

As a program it labels, killed with SIGKILL at random instants until it is done:

    python fake_teacher.py MANIFEST OUTPUT KILLS
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from flax_distil.audio.load import encode_flac
from flax_distil.config import DataConfig, PseudoLabelConfig
from flax_distil.data.utterances import read_dataset
from flax_distil.decode.options import Hypothesis
from flax_distil.pseudo_label.labeller import LabelSummary, label, settings
from flax_distil.pseudo_label.store import open_store
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


def label_with(config: PseudoLabelConfig, teacher=fake_teacher) -> LabelSummary:
    """`run` with this teacher in place of a Whisper."""
    utterances = read_dataset(config.data)
    store = open_store(config.output_dir, settings(config, utterances, "fake", 51864))
    return label(utterances, teacher, store, config)


def label_slowly(manifest: str, output: str) -> None:
    """23 clips in six shards and about half a second."""

    def slow(waveforms_BN, language):
        time.sleep(0.04)
        return fake_teacher(waveforms_BN, language)

    data, folder = DataConfig(manifest), Path(output)
    config = PseudoLabelConfig(
        data=data, model="fake", output_dir=folder, batch_size=3, shard_size=4, workers=2
    )
    label_with(config, slow)


def label_killed(manifest: str, output: str, kills: int) -> None:
    """Label in child processes; the first `kills` of them are killed at a random instant."""
    word_errors([normalizer("en")("loaded once")], ["not by each child"])
    chance = random.Random(0)
    for attempt in range(kills + 1):
        child = os.fork()  # nothing here has started a thread yet
        if not child:
            label_slowly(manifest, output)
            os._exit(0)
        if attempt < kills:
            # Mostly early, so that there is work left for the next; each stage is hit.
            time.sleep(chance.expovariate(1 / 0.12))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    label_killed(sys.argv[1], sys.argv[2], int(sys.argv[3]))
