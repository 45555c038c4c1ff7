"""The frozen encoder's output for every clip, kept on disk so that it is computed once.

A folder holds one dataset's states, in files of any number of clips that are written atomically.
All clips of a file have the same number S of positions:

    *.safetensors    clips     uint64 [n]             names of the clips (`clip_names`); several
                                                      rows for a packed window that needs several
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int16, UInt64
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import DecodedClip, decode_clips, pad_clips
from flax_distil.data.workers import map_in_order
from flax_distil.errors import InputError
from flax_distil.files import remove_partial, write_whole
from flax_distil.model.dims import POSITION_SAMPLES
from flax_distil.model.generation import WHOLE_WINDOW, fitting_context
from flax_distil.parallel.multihost import barrier

log = logging.getLogger(__name__)

FILE_CLIPS = 64  # per file that training writes; a kill loses at most these
ENCODING_SECONDS = 30 * 24 * 3600.0  # how long hosts wait for each other

StateDtype = Literal["bfloat16", "int8"]

# Waveforms of one static batch, and the number of positions (None: all), to audio states.
Encode = Callable[[Int16[np.ndarray, "B N"], int | None], Float[Array, "B S D"]]


@dataclass(frozen=True)
class StateFolder:
    """The folder of one dataset's states, and the names of its clips in order."""

    path: Path
    names: UInt64[np.ndarray, "n"]


class ClipStates(NamedTuple):
    """Where the states of one clip are, and its length."""

    states: Any
    """Of all clips of its file, read on demand."""
    row: int
    positions: int
    seconds: float
    step: Float32[np.ndarray, "1 D"] | None
    parts: list[float] | None
    """Of a packed window: seconds of each part, NaN for one not in the clip."""

    def read(self, longest: int = 0) -> BFloat16[np.ndarray, "S D"]:
        """The clip's states, padded to `longest` positions."""
        states_SD = self.states[self.row]
        if self.step is not None:
            states_SD = (states_SD * self.step).astype(bfloat16)
        return np.pad(states_SD, ((0, max(longest - self.positions, 0)), (0, 0)))


@dataclass(frozen=True)
class StoredAudioStates:
    """States of all utterances of a run's datasets."""

    clips: tuple[tuple[ClipStates, ...], ...]
    """Of each utterance: one clip, or the several that a packed window was split to."""

    def clip(self, utterance: int, turn: int = 0) -> ClipStates:
        """The utterance's clip, of several another one each turn (see `windows.decode_clip`)."""
        clips = self.clips[utterance]
        return clips[turn % len(clips)]

    def read(
        self, utterances: Iterable[int], turns: Iterable[int] | None = None
    ) -> BFloat16[np.ndarray, "B S D"]:
        """The states of one clip of each utterance."""
        clips = map(self.clip, utterances, repeat(0) if turns is None else turns)
        return np.stack([clip.read() for clip in clips])


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
        # Multiples of a step per channel and clip: a few channels are far larger than all others.
        wide_NSD = tensors["states"].astype(np.float32)
        steps = np.maximum(np.abs(wide_NSD).max(axis=1, keepdims=True), 1e-6) / 127
        tensors |= {"states": np.round(wide_NSD / steps).astype(np.int8), "steps": steps}
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


def load_or_encode(
    folders: Sequence[StateFolder],
    utterances: Sequence[Utterance],
    encode: Encode,
    batch_size: int = 16,
    workers: int = 4,
    dtype: StateDtype = "bfloat16",
    contexts: Sequence[int] = (),
) -> StoredAudioStates:
    """The states of all datasets; those missing are encoded, so that a killed run can be resumed.

    utterances: those of the folders, in order; a packed window whose audio needs several clips has
    states of each. contexts: audio positions, of which each clip gets as many as it needs; all by
    default. Several hosts encode a part each, and all read all.

    Raises:
        InputError: a file is damaged, the disk is full, or the hosts do not share it.
    """
    starts = np.cumsum([0, *(len(folder.names) for folder in folders)])
    indexed = [index_files(folder) for folder in folders]
    for folder in folders:
        remove_partial(folder.path)
    barrier(f"{folders[0].path} looked through")  # before anyone writes
    work = [
        (folder, start, rows)
        for folder, start, clips in zip(folders, starts, indexed, strict=False)
        for rows in split_files(np.flatnonzero([not some for some in clips]))
    ]
    mine = work[jax.process_index() :: jax.process_count()]
    total = sum(len(rows) for _, _, rows in mine)
    with tqdm(total=total, desc="encoding", unit="clip", disable=not total) as bar:
        for folder, start, rows in mine:
            decoded = map_in_order(
                lambda number: [(number, clip) for clip in _clips(utterances[number])],
                start + rows,
                workers,
                ahead=2 * batch_size,
            )
            groups: dict[int, _Encoding] = defaultdict(lambda: _Encoding([], []))
            for pieces in decoded:
                samples = max(len(clip.samples) for _, clip in pieces)
                positions = fitting_context(contexts, -(-samples // POSITION_SAMPLES))
                group = groups[positions]
                group.pieces.extend(pieces)
                while len(group.pieces) >= len(group.states) + batch_size:
                    group.encode_next(encode, batch_size, positions)
                bar.update()
            for positions, group in groups.items():
                while len(group.pieces) > len(group.states):
                    group.encode_next(encode, batch_size, positions)
                numbers = np.array([number for number, _ in group.pieces]) - start
                whole = folder.names[np.unique(numbers)].tobytes()
                path = (
                    folder.path / f"{hashlib.blake2b(whole, digest_size=8).hexdigest()}.safetensors"
                )
                seconds = [clip.duration for _, clip in group.pieces]
                parts = [clip.parts for _, clip in group.pieces]
                write_states(path, folder.names[numbers], seconds, group.states, dtype, parts)
    barrier(f"{folders[0].path} written", ENCODING_SECONDS)
    if work:
        indexed = [index_files(folder) for folder in folders]
    for folder, clips in zip(folders, indexed, strict=True):
        if missing := clips.count(()):
            raise InputError(
                f"{folder.path} lacks {missing} of {len(clips)} clips that another host encoded: "
                "name a folder on a disk that all hosts share"
            )
    return StoredAudioStates(tuple(clip for clips in indexed for clip in clips))


class _Encoding(NamedTuple):
    """Clips of one file, by the numbers of their utterances, and the states of the first ones."""

    pieces: list[tuple[int, DecodedClip]]
    states: list[Any]

    def encode_next(self, encode: Encode, batch_size: int, positions: int) -> None:
        """The states of the next clips."""
        clips = [clip for _, clip in self.pieces[len(self.states) :][:batch_size]]
        waveforms_BN = pad_clips(clips, batch_size).waveforms
        if positions == WHOLE_WINDOW:
            states_BSD = encode(waveforms_BN, None)
        else:
            # The last frame reaches over the end, into zeros.
            states_BSD = encode(waveforms_BN[:, : (positions + 1) * POSITION_SAMPLES], positions)
        self.states.extend(np.asarray(states_BSD).astype(bfloat16)[: len(clips)])


def _clips(utterance: Utterance) -> list[DecodedClip]:
    """An utterance's clips; one that cannot be decoded is silence of 0 seconds."""
    clips = decode_clips(utterance)
    if isinstance(clips, Skipped):
        log.warning("%s is left out: %s", clips.id, clips.reason)
        return [DecodedClip(Utterance(clips.id, b""), np.zeros(0, np.int16))]
    return clips


def split_files(rows: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "_"]]:
    """Clips by the file that they are written to."""
    return [rows[first : first + FILE_CLIPS] for first in range(0, len(rows), FILE_CLIPS)]


def index_files(folder: StateFolder) -> list[tuple[ClipStates, ...]]:
    """Where the states of each utterance's clips are; () for one not encoded yet.

    Raises:
        InputError: a file is damaged.
    """
    known: dict[int, tuple[ClipStates, ...]] = {}
    for path in sorted(folder.path.glob("[!.]*.safetensors")):
        try:
            opened = safe_open(path, framework="numpy")
            optional = set(opened.keys()).intersection(("steps", "parts"))
            names, seconds = opened.get_tensor("clips"), opened.get_tensor("seconds")
            steps, parts = (
                opened.get_tensor(name) if name in optional else [None] * len(names)
                for name in ("steps", "parts")
            )
            states = opened.get_slice("states")
            positions = states.get_shape()[1]
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it, and its clips are encoded again"
            ) from None
        here: dict[int, tuple[ClipStates, ...]] = {}
        for row, name in enumerate(names.tolist()):
            lengths = parts[row]  # NaN throughout for a clip that is not a window
            lengths = None if lengths is None or np.isnan(lengths).all() else lengths.tolist()
            clip = ClipStates(states, row, positions, float(seconds[row]), steps[row], lengths)
            here[name] = (*here.get(name, ()), clip)
        known |= here
    return [known.get(name, ()) for name in folder.names.tolist()]
