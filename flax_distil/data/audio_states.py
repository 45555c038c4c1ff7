"""The frozen encoder's output for every clip, kept on disk so that it is computed once.

A folder holds one dataset's states, in files of any number of clips that are written atomically:

    *.safetensors    clips     uint64 [n]             names of the clips (`clip_names`)
                     seconds   float32 [n]            length of each; 0 if it was not decoded
                     states    bfloat16 [n, S, D]; or int8 with
                     steps     float32 [n, 1, D]      the scale of each clip's channels
                     parts     float32 [n, P]         of packed windows: length of each part, NaN
                                                      for a part not in the clip

Files are written by the labeller, which encodes every clip anyway, or by training for the clips
that are missing, on several hosts a part each. Filtering labels does not change them. A clip takes
S · D · 2 bytes, 1.1 MiB with tiny and 3.7 MiB with large; half of that in int8.
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

from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import DecodedClip, decode_clip, map_in_order, pad_clips
from flax_distil.errors import InputError
from flax_distil.files import remove_partial, write_whole
from flax_distil.parallel.multihost import barrier

log = logging.getLogger(__name__)

FILE_CLIPS = 64  # per file that training writes; a kill loses at most these
ENCODING_SECONDS = 30 * 24 * 3600.0  # how long hosts wait for each other

StateDtype = Literal["bfloat16", "int8"]

# Waveforms of one static batch to audio states.
Encode = Callable[[Int16[np.ndarray, "B N"]], Float[Array, "B S D"]]


@dataclass(frozen=True)
class StateFolder:
    """The folder of one dataset's states, and the names of its clips in order."""

    path: Path
    names: UInt64[np.ndarray, "n"]


class StateFile(NamedTuple):
    """One file, whose states are read on demand."""

    states: Any
    steps: Float32[np.ndarray, "n 1 D"] | None
    parts: Float32[np.ndarray, "n P"] | None = None


class ClipStates(NamedTuple):
    """Where the states of one clip are, and its length."""

    file: StateFile
    row: int
    seconds: float

    def read(self) -> BFloat16[np.ndarray, "S D"]:
        """The clip's states."""
        states_SD = self.file.states[self.row]
        if self.file.steps is None:
            return states_SD
        return (states_SD * self.file.steps[self.row]).astype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class StoredAudioStates:
    """States of all clips of a run's datasets."""

    clips: tuple[ClipStates, ...]

    def read(self, clips: Sequence[int]) -> BFloat16[np.ndarray, "B S D"]:
        """The states of these clips."""
        return np.stack([self.clips[clip].read() for clip in clips])

    def seconds(self, clip: int) -> float:
        """Length of a clip; 0 if it was not decoded."""
        return self.clips[clip].seconds

    def parts(self, clip: int) -> list[float] | None:
        """Seconds of each part of a packed window, NaN for a part not in the clip; None for a clip
        that is not a window or was not decoded."""
        file, row, _ = self.clips[clip]
        return (
            None
            if file.parts is None or np.isnan(file.parts[row]).all()
            else file.parts[row].tolist()
        )


def clip_names(*columns: Iterable[Any]) -> UInt64[np.ndarray, "n"]:
    """A hash for each clip of a dataset. columns: what distinguishes clips, a value per clip."""
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
    dtype: StateDtype = "bfloat16",
    parts: Sequence[Sequence[float | None]] = (),
) -> None:
    """Write a file of states atomically.

    parts: of packed windows, seconds of each part, None for one not in the clip.

    Raises:
        InputError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"clips": names, "seconds": np.array(seconds, np.float32), "states": np.stack(states)}
    if dtype == "int8":
        tensors["states"], tensors["steps"] = quantize(tensors["states"])
    if longest := max(map(len, parts), default=0):
        padded = [[*row, *[None] * (longest - len(row))] for row in parts]
        tensors["parts"] = np.array(padded, np.float32)
    try:
        write_whole(path, save(tensors))
    except OSError as error:
        raise InputError(
            f"cannot write {tensors['states'].nbytes / 2**20:.0f} MiB of audio states to "
            f"{path.parent} ({error}): choose a larger disk, or leave out audio_states"
        ) from None


def quantize(
    states_NSD: BFloat16[np.ndarray, "n S D"],
) -> tuple[Int8[np.ndarray, "n S D"], Float32[np.ndarray, "n 1 D"]]:
    """States as multiples of a step per channel and clip: a few channels of Whisper's encoder are
    far larger than all others."""
    wide_NSD = states_NSD.astype(np.float32)
    steps = np.maximum(np.abs(wide_NSD).max(axis=1, keepdims=True), 1e-6) / 127
    return np.round(wide_NSD / steps).astype(np.int8), steps


def load_or_encode(
    folders: Sequence[StateFolder],
    utterances: Sequence[Utterance],
    encode: Encode,
    batch_size: int = 16,
    workers: int = 4,
    dtype: StateDtype = "bfloat16",
) -> StoredAudioStates:
    """The states of all datasets; those missing are encoded, so that a killed run can be resumed.

    utterances: those of the folders, in order. Several hosts encode a part each, and all read all.

    Raises:
        InputError: a file is damaged, the disk is full, or the hosts do not share it.
    """
    starts = np.cumsum([0, *(len(folder.names) for folder in folders)])
    found = [index_files(folder) for folder in folders]
    for folder in folders:
        remove_partial(folder.path)
    barrier(f"{folders[0].path} looked through")  # before anyone writes
    work = [
        (folder, start, rows)
        for folder, start, clips in zip(folders, starts, found, strict=False)
        for rows in split_files(np.flatnonzero([clip is None for clip in clips]))
    ]
    mine = work[jax.process_index() :: jax.process_count()]
    total = sum(len(rows) for _, _, rows in mine)
    with tqdm(total=total, desc="encoding", unit="clip", disable=not total) as bar:
        for folder, start, rows in mine:
            clips = (utterances[start + row] for row in rows)
            encoded = _encode_clips(clips, encode, batch_size, workers, bar)
            names = folder.names[rows]
            digest = hashlib.blake2b(names.tobytes(), digest_size=8).hexdigest()
            path = folder.path / f"{digest}.safetensors"
            write_states(path, names, encoded.seconds, encoded.states, dtype, encoded.parts)
    barrier(f"{folders[0].path} written", ENCODING_SECONDS)
    if work:
        found = [index_files(folder) for folder in folders]
    for folder, clips in zip(folders, found, strict=True):
        if missing := clips.count(None):
            raise InputError(
                f"{folder.path} lacks {missing} of {len(clips)} clips that another host encoded: "
                "name a folder on a disk that all hosts share"
            )
    return StoredAudioStates(tuple(clip for clips in found for clip in clips if clip is not None))


def split_files(rows: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "_"]]:
    """Clips by the file that they are written to."""
    return [rows[first : first + FILE_CLIPS] for first in range(0, len(rows), FILE_CLIPS)]


def index_files(folder: StateFolder) -> list[ClipStates | None]:
    """Where the states of each clip of a dataset are; None for those not encoded yet.

    Raises:
        InputError: a file is damaged.
    """
    known: dict[int, ClipStates] = {}
    for path in sorted(folder.path.glob("[!.]*.safetensors")):
        try:
            opened = safe_open(path, framework="numpy")
            names, seconds = opened.get_tensor("clips"), opened.get_tensor("seconds")
            known_names = set(opened.keys())
            steps, parts = (
                opened.get_tensor(name) if name in known_names else None
                for name in ("steps", "parts")
            )
            file = StateFile(opened.get_slice("states"), steps, parts)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it, and its clips are encoded again"
            ) from None
        for row, (name, length) in enumerate(zip(names.tolist(), seconds.tolist(), strict=True)):
            known[name] = ClipStates(file, row, length)
    return [known.get(name) for name in folder.names.tolist()]


class EncodedClips(NamedTuple):
    """What is written of some clips."""

    seconds: list[float]
    states: list[np.ndarray]
    parts: list[Sequence[float | None]]


def _encode_clips(
    utterances: Iterable[Utterance], encode: Encode, batch_size: int, workers: int, bar: tqdm
) -> EncodedClips:
    """Seconds, states and parts of clips; one that cannot be decoded is silence of 0 seconds."""
    result = EncodedClips([], [], [])
    decoded = map_in_order(decode_clip, utterances, workers, ahead=2 * batch_size)
    while some := list(islice(decoded, batch_size)):
        clips = [_or_silence(one) for one in some]
        for clip in clips:
            if missing := clip.parts.count(None):
                log.warning(
                    "%s: %d of %d parts are not in its audio states: they are damaged, or longer "
                    "than a window together",
                    *(clip.utterance.id, missing, len(clip.parts)),
                )
            result.parts.append(clip.parts)
            result.seconds.append(clip.duration)
        waveforms = pad_clips(clips, batch_size).waveforms
        result.states.extend(np.asarray(encode(waveforms)).astype(ml_dtypes.bfloat16)[: len(clips)])
        bar.update(len(clips))
    return result


def _or_silence(clip: DecodedClip | Skipped) -> DecodedClip:
    if isinstance(clip, DecodedClip):
        return clip
    log.warning("%s is left out: %s", clip.id, clip.reason)
    return DecodedClip(Utterance(clip.id, b""), np.zeros(0, np.int16))
