"""Audio states of a run's clips: those on disk, and those still to encode."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_distil.config import DistillConfig
from flax_distil.data.audio_states import StateFolder, StoredAudioStates, clip_names, load_or_encode
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import UTTERANCE_NUMBER, Concatenated, Utterances
from flax_distil.data.windows import identity
from flax_distil.decode.recognizer import encode
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.generation import context_positions
from flax_distil.model.spec import Spec
from flax_distil.parallel.clips import replicate
from flax_distil.pseudo_label.jobs import fingerprint, states_folder
from flax_distil.pseudo_label.store import SETTINGS, read_settings


def kept_states(
    config: DistillConfig, teacher: Checkpoint, sources: Sequence[TrainingSource]
) -> StoredAudioStates | None:
    """The encoder's output of all clips, on disk; what is missing is encoded first."""
    if config.audio_states is None:
        return None
    encoder = teacher.params["encoder"]
    contexts = context_positions(config.audio_context)
    spec = Spec(teacher.dims, config.compute.dtype).on(jax.local_devices()[0])
    params = replicate(jax.device_put(encoder, jax.local_devices()[0]))
    return load_or_encode(
        [
            one
            for source in sources
            for one in folders(config.audio_states, encoder, source, contexts)
        ],
        Concatenated([source.utterances for source in sources]),  # type: ignore[misc]
        lambda waveforms_BN, positions: encode(spec, params, waveforms_BN, positions),
        config.validation.batch_size,
        config.run.workers,
        config.audio_states_dtype,
        contexts,
    )


def folders(
    root: Path, encoder: dict, source: TrainingSource, contexts: Sequence[int] = ()
) -> list[StateFolder]:
    """The folders of a source's states, one a dataset; those of short contexts lie below those of
    the whole window."""
    utterances: Any = source.utterances  # not a stream: `check` refuses those
    if isinstance(utterances, Concatenated):
        parts = utterances.parts
        lengths = np.split(source.lengths, np.cumsum([len(part) for part in parts])[:-1])
    else:
        parts, lengths = (utterances,), [source.lengths]
    found = [state_folder(root, encoder, *one) for one in zip(parts, lengths, strict=True)]
    below = "-".join(["positions", *map(str, contexts)]) if contexts else ""
    return [replace(one, path=one.path / below) for one in found]


def state_folder(
    root: Path, encoder: dict, utterances: Sequence, lengths: np.ndarray
) -> StateFolder:
    """The folder of one dataset's states: for a label store, the labeller's own."""
    if isinstance(utterances, Utterances):
        store = Path(utterances.config.source)
        if (store / SETTINGS).is_file():
            columns = (UTTERANCE_NUMBER, "id", "duration", "mean_log_probability")
            names = clip_names(*map(utterances.column, columns))
            return StateFolder(states_folder(root, encoder, read_settings(store)), names)
    digest = hashlib.sha256(repr(identity(utterances)).encode() + lengths.tobytes()).hexdigest()
    return StateFolder(root / fingerprint(encoder) / digest[:16], clip_names(range(len(lengths))))
