"""What the frozen encoder says of every clip, kept on disk: it never changes, so it runs once.

    states.bf16    [clips, S, D] bfloat16, in the order of the dataset
    seconds.f32    [clips] length of each clip; 0 where it could not be heard
    states.json    what made them, and how many are there

A clip takes S · D · 2 bytes: 1.1 MiB with tiny, 3.7 MiB with large.
"""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int16
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import hear, in_order
from flax_distil.errors import InputError

log = logging.getLogger(__name__)

# Waveforms of one static batch to audio states.
Encode = Callable[[Int16[np.ndarray, "B N"]], Float[Array, "B S D"]]


@dataclass(frozen=True)
class AudioStates:
    """States of all clips of a dataset, memory-mapped: [clips, S, D] and seconds [clips]."""

    states: np.ndarray
    seconds: np.ndarray


def audio_states(
    folder: Path,
    utterances: Sequence[Utterance],
    encode: Encode,
    shape: tuple[int, int],
    made_by: dict[str, Any],
    batch_size: int = 16,
    workers: int = 4,
) -> AudioStates:
    """The states in `folder`, after encoding what is not there yet; a killed run goes on.

    shape: (S, D) of one clip. made_by: what decides the states (JSON), such as hashes of encoder
        and data; it must be the same every time.

    Raises:
        InputError: the folder holds the states of another encoder or dataset, or the disk is full.
    """
    facts, count = folder / "states.json", len(utterances)
    done = _begin(facts, made_by | {"clips": count, "shape": list(shape)})
    mode = "r+" if (folder / "states.bf16").exists() else "w+"
    try:
        raw = np.memmap(folder / "states.bf16", np.uint16, mode, shape=(count, *shape))
        seconds = np.memmap(folder / "seconds.f32", np.float32, mode, shape=(count,))
        states = raw.view(ml_dtypes.bfloat16)
        with tqdm(total=count, initial=done, desc="encoding", unit="clip") as bar:
            for start in range(done, count, batch_size):
                rows = range(start, min(start + batch_size, count))
                _encode(rows, utterances, encode, batch_size, workers, states, seconds)
                raw.flush()
                seconds.flush()
                _write(facts, json.loads(facts.read_text()) | {"done": rows.stop})
                bar.update(len(rows))
    except OSError as error:
        size = count * shape[0] * shape[1] * 2 / 2**30
        raise InputError(
            f"{folder} cannot take {size:.1f} GiB of audio states ({error.strerror}): choose a "
            "larger disk, or train without audio_states"
        ) from None
    return AudioStates(states, seconds)


def _begin(facts: Path, wanted: dict[str, Any]) -> int:
    """How many clips are there already, by the same encoder and data."""
    if not facts.exists():
        facts.parent.mkdir(parents=True, exist_ok=True)
        _write(facts, wanted | {"done": 0})
        return 0
    found = json.loads(facts.read_text())
    if differing := [key for key in wanted if found.get(key) != wanted[key]]:
        raise InputError(
            f"{facts.parent} holds audio states of another run ({', '.join(differing)} differ): "
            "name another folder or delete this one"
        )
    return found["done"]


def _encode(rows, utterances, encode, batch_size, workers, states, seconds) -> None:
    waveforms = np.zeros((batch_size, CLIP_SAMPLES), np.int16)
    clips = in_order(hear, (utterances[row] for row in rows), workers, ahead=batch_size)
    for place, (row, clip) in enumerate(zip(rows, clips, strict=True)):
        if isinstance(clip, Skipped):
            log.warning("%s is left out: %s", clip.id, clip.reason)
            seconds[row] = 0
            continue
        waveforms[place, : len(clip.samples)] = clip.samples
        seconds[row] = clip.duration
    encoded = np.asarray(encode(waveforms)).astype(ml_dtypes.bfloat16)
    states[rows.start : rows.stop] = encoded[: len(rows)]


def _write(path: Path, contents: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(contents, indent=1))
    os.replace(part, path)
