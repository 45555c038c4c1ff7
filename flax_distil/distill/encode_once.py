"""Audio states of a run's clips: which there are, whose they are, and what is still to encode."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_distil.config import DistillConfig
from flax_distil.data.audio_states import AudioStates, StateFolder, clip_names, load_or_encode
from flax_distil.data.augment import uses_spec_augment
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.packing import identity
from flax_distil.data.utterances import UTTERANCE_NUMBER, Concatenated, Utterances
from flax_distil.decode.recognizer import encode
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Spec
from flax_distil.model.student import same_arrays
from flax_distil.parallel.clips import replicate
from flax_distil.pseudo_label.identity import fingerprint, states_folder
from flax_distil.pseudo_label.store import SETTINGS, read_settings


def kept_states(
    config: DistillConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    sources: Sequence[TrainingSource],
) -> AudioStates | None:
    """The encoder's output of all clips from disk, where the run keeps it there.

    Raises InputError where the student does not share the teacher's frozen encoder.
    """
    if config.audio_states is None:
        return None
    encoders = teacher.params["encoder"], student.params["encoder"]
    if config.train_encoder or not same_arrays(*encoders):
        raise InputError(
            "audio_states hold what the teacher's frozen encoder says, and this student has an "
            "encoder of its own: leave audio_states out"
        )
    changing = config.augment.noise or uses_spec_augment(config.augment)
    if changing or any(source.size is None for source in sources):
        raise InputError(
            "audio_states hold one output for each clip of a dataset: leave them out with streams, "
            "noise or SpecAugment"
        )
    spec = Spec(teacher.dims, config.compute.dtype).on(jax.local_devices()[0])
    params = replicate(jax.device_put(encoders[0], jax.local_devices()[0]))
    return load_or_encode(
        [one for source in sources for one in folders(config.audio_states, encoders[0], source)],
        Concatenated([source.utterances for source in sources]),  # type: ignore[misc]
        lambda waveforms_BN: encode(spec, params, waveforms_BN),
        config.validation.batch_size,
        config.run.workers,
        config.audio_states_dtype,
    )


def folders(root: Path, encoder: dict, source: TrainingSource) -> list[StateFolder]:
    """Where the states of a source are, dataset by dataset."""
    utterances: Any = source.utterances  # no stream: those are refused before
    if isinstance(utterances, Concatenated):
        parts = utterances.parts
        lengths = np.split(source.lengths, np.cumsum([len(part) for part in parts])[:-1])
    else:
        parts, lengths = (utterances,), [source.lengths]
    return [state_folder(root, encoder, *one) for one in zip(parts, lengths, strict=True)]


def state_folder(
    root: Path, encoder: dict, utterances: Sequence, lengths: np.ndarray
) -> StateFolder:
    """That of one dataset: of a label store, where the labeller keeps them too."""
    if isinstance(utterances, Utterances):
        store = Path(utterances.config.source)
        if (store / SETTINGS).is_file():
            columns = (UTTERANCE_NUMBER, "id", "duration", "mean_log_probability")
            names = clip_names(*map(utterances.column, columns))
            return StateFolder(states_folder(root, encoder, read_settings(store)), names)
    digest = hashlib.sha256(repr(identity(utterances)).encode() + lengths.tobytes()).hexdigest()
    return StateFolder(root / fingerprint(encoder) / digest[:16], clip_names(range(len(lengths))))
