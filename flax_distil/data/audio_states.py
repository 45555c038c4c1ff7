"""What the frozen encoder says of every clip, kept on disk: it never changes, so it runs once.

A folder holds one dataset's, in files of any number of clips that appear whole or not at all:

    *.safetensors    clips     uint64 [n]             whose they are (`clip_names`)
                     seconds   float32 [n]            length of each; 0 where it was not heard
                     states    bfloat16 [n, S, D]; or int8 with
                     steps     float32 [n, 1, D]      what 1 stands for, by clip and channel
                     parts     float32 [n, P]         of packed windows: length of each part, NaN
                                                      of one that is not in the clip

Who wrote a file does not matter: the labeller, which encodes every clip anyway, or training, for
what is not there yet, each host a part of it. Filtering labels leaves it as it is. A clip takes
S · D · 2 bytes, 1.1 MiB with tiny and 3.7 MiB with large; in int8 half of that.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int8, Int16, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from flax_distil.audio.load import CLIP_SAMPLES
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import decode_clip, map_in_order
from flax_distil.errors import InputError
from flax_distil.files import remove_partial, write_whole
from flax_distil.parallel.multihost import barrier

log = logging.getLogger(__name__)

FILE_CLIPS = 64  # that training writes at a time, and that a kill can cost
ENCODING_SECONDS = 30 * 24 * 3600.0  # hosts wait for each other as long as they live

StateDtype = Literal["bfloat16", "int8"]
STORED_TOO = ("steps", "parts")  # where they are needed

# Waveforms of one static batch to audio states.
Encode = Callable[[Int16[np.ndarray, "B N"]], Float[Array, "B S D"]]


@dataclass(frozen=True)
class StateFolder:
    """Where the states of one dataset are, and the names of its clips, in its order."""

    path: Path
    names: UInt64[np.ndarray, "n"]


class StateFile(NamedTuple):
    """One file, whose states are read when they are asked for."""

    states: Any
    steps: Float32[np.ndarray, "n 1 D"] | None
    parts: Float32[np.ndarray, "n P"] | None = None

    def read(self, place: int) -> BFloat16[np.ndarray, "S D"]:
        """The states of one clip."""
        states_SD = self.states[int(place)]
        if self.steps is None:
            return states_SD
        return (states_SD * self.steps[place]).astype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class AudioStates:
    """States of all clips of a run's datasets."""

    files: tuple[StateFile, ...]
    places: Int[np.ndarray, "clips 2"]
    """File of each clip, and its place in it."""
    seconds: Float32[np.ndarray, "clips"]

    def read(self, clips: Sequence[int]) -> BFloat16[np.ndarray, "B S D"]:
        """The states of these clips."""
        return np.stack([self.files[file].read(at) for file, at in self.places[list(clips)]])

    def parts(self, clip: int) -> list[float] | None:
        """Seconds of each part of a packed window, NaN of one whose sound is not in the states;
        None of a clip that is no window or could not be decoded."""
        file, at = self.places[clip]
        parts = self.files[file].parts
        return None if parts is None or np.isnan(parts[at]).all() else parts[at].tolist()


def clip_names(*columns: Iterable[Any]) -> UInt64[np.ndarray, "n"]:
    """A name for each clip of a dataset, of what tells it from others: a value of each column."""
    digests = [
        hashlib.blake2b(repr(row).encode(), digest_size=8).digest()
        for row in zip(*columns, strict=True)
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def write_states(
    path: Path,
    names: UInt64[np.ndarray, "n"],
    seconds: Sequence[float],
    states: Sequence[BFloat16[np.ndarray, "S D"]],
    stored: StateDtype = "bfloat16",
    parts: Sequence[Sequence[float | None]] = (),
) -> None:
    """Put a file in its place: there or not there, never half.

    parts: of packed windows, seconds of each part, None of one that is not in the clip.

    Raises InputError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"clips": names, "seconds": np.array(seconds, np.float32), "states": np.stack(states)}
    if stored == "int8":
        tensors["states"], tensors["steps"] = quantize(tensors["states"])
    if longest := max(map(len, parts), default=0):
        filled = [[*row, *[None] * (longest - len(row))] for row in parts]
        tensors["parts"] = np.array(filled, np.float32)
    try:
        write_whole(path, save(tensors))
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot take {tensors['states'].nbytes / 2**20:.0f} MiB of audio states "
            f"({error}): choose a larger disk, or do without audio_states"
        ) from None


def quantize(
    states_NSD: BFloat16[np.ndarray, "n S D"],
) -> tuple[Int8[np.ndarray, "n S D"], Float32[np.ndarray, "n 1 D"]]:
    """States as multiples of a step, which each channel of a clip has: a few channels of Whisper's
    encoder are far louder than all others."""
    wide_NSD = states_NSD.astype(np.float32)
    steps = np.maximum(np.abs(wide_NSD).max(axis=1, keepdims=True), 1e-6) / 127
    return np.round(wide_NSD / steps).astype(np.int8), steps


def load_or_encode(
    folders: Sequence[StateFolder],
    utterances: Sequence[Utterance],
    encode: Encode,
    batch_size: int = 16,
    workers: int = 4,
    stored: StateDtype = "bfloat16",
) -> AudioStates:
    """The states of all datasets, after encoding what is not there yet; a killed run goes on.

    utterances: those of the folders, one dataset after the other. Several hosts encode a part each,
        and each can read all.

    Raises:
        InputError: a file is damaged, the disk is full, or not shared by all hosts.
    """
    starts = np.cumsum([0, *(len(folder.names) for folder in folders)])
    found = [index_files(folder) for folder in folders]
    for folder in folders:
        remove_partial(folder.path)
    barrier(f"{folders[0].path} looked through")  # before anyone writes
    work = [
        (folder, start, rows)
        for folder, start, (_, places, _) in zip(folders, starts, found, strict=False)
        for rows in split_files(np.flatnonzero(places[:, 0] < 0))
    ]
    mine = work[jax.process_index() :: jax.process_count()]
    total = sum(len(rows) for _, _, rows in mine)
    with tqdm(total=total, desc="encoding", unit="clip", disable=not total) as bar:
        for folder, start, rows in mine:
            clips = (utterances[start + row] for row in rows)
            seconds, states, parts = _encoded(clips, encode, batch_size, workers, bar)
            names = folder.names[rows]
            digest = hashlib.blake2b(names.tobytes(), digest_size=8).hexdigest()
            write_states(
                folder.path / f"{digest}.safetensors", names, seconds, states, stored, parts
            )
    barrier(f"{folders[0].path} written", ENCODING_SECONDS)
    if work:
        found = [index_files(folder) for folder in folders]
    for folder, (_, places, _) in zip(folders, found, strict=True):
        if lacking := int((places[:, 0] < 0).sum()):
            raise InputError(
                f"{folder.path} lacks {lacking} of {len(places)} clips that another host encoded: "
                "name a folder on a disk that all hosts share"
            )
    return _joined(found)


def split_files(rows: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "m"]]:
    """Clips by the file that they are written to."""
    return [rows[first : first + FILE_CLIPS] for first in range(0, len(rows), FILE_CLIPS)]


StateIndex = tuple[list[Any], Int[np.ndarray, "n 2"], Float32[np.ndarray, "n"]]


def index_files(folder: StateFolder) -> StateIndex:
    """The files of a dataset, where each clip is in them (file -1: nowhere), and its seconds."""
    files, there = [], {}
    for path in sorted(folder.path.glob("[!.]*.safetensors")):
        try:
            file = safe_open(path, framework="numpy")
            names, seconds = file.get_tensor("clips"), file.get_tensor("seconds")
            optional = set(file.keys())
            more = [file.get_tensor(one) if one in optional else None for one in STORED_TOO]
            files.append(StateFile(file.get_slice("states"), *more))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it, and its clips are encoded again"
            ) from None
        for place, name in enumerate(names.tolist()):
            there[name] = len(files) - 1, place, seconds[place]
    found = [there.get(name, (-1, 0, 0.0)) for name in folder.names.tolist()]
    places = np.array([one[:2] for one in found], np.int64).reshape(-1, 2)
    return files, places, np.array([one[2] for one in found], np.float32)


def _joined(found: Sequence[StateIndex]) -> AudioStates:
    files, places, seconds = zip(*found, strict=True)
    before = np.cumsum([0, *map(len, files)])
    moved = [one + np.array([shift, 0]) for one, shift in zip(places, before, strict=False)]
    every = tuple(file for some in files for file in some)
    return AudioStates(every, np.concatenate(moved), np.concatenate(seconds))


def _encoded(
    utterances: Iterable[Utterance], encode: Encode, batch_size: int, workers: int, bar: tqdm
) -> tuple[list[float], list[np.ndarray], list[Sequence[float | None]]]:
    """Seconds, states and parts of some clips; 0 and silence for one that cannot be decoded."""
    seconds: list[float] = []
    parts: list[Sequence[float | None]] = []
    states: list[np.ndarray] = []
    clips = map_in_order(decode_clip, utterances, workers, ahead=2 * batch_size)
    while some := list(islice(clips, batch_size)):
        waveforms = np.zeros((batch_size, CLIP_SAMPLES), np.int16)
        for waveform, clip in zip(waveforms, some, strict=False):
            parts.append(() if isinstance(clip, Skipped) else clip.parts)
            if isinstance(clip, Skipped):
                log.warning("%s is left out: %s", clip.id, clip.reason)
                seconds.append(0.0)
                continue
            if lacking := clip.parts.count(None):
                log.warning(
                    "%s: %d of %d parts are not in its audio states: they are damaged, or longer "
                    "than a window together",
                    *(clip.utterance.id, lacking, len(clip.parts)),
                )
            waveform[: len(clip.samples)] = clip.samples
            seconds.append(clip.duration)
        encoded = np.asarray(encode(waveforms)).astype(ml_dtypes.bfloat16)
        states += list(encoded[: len(some)])
        bar.update(len(some))
    return seconds, states, parts
