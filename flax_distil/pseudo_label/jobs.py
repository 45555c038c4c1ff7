"""What is to be labelled: datasets, their windows, and the store that receives the labels."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.utterances import Utterance, Utterances, UtteranceStream, read_dataset
from flax_distil.data.windows import Packed, pack
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.pseudo_label.store import LabelStore, open_store

Dataset = Utterances | UtteranceStream | Packed

# Fields that do not change the labels.
PLACE_AND_PACE = ["batch_size", "workers", "output_dir", "engine", "ray_workers"]
PLACE_AND_PACE += ["audio_states", "audio_states_dtype", "assistant", "draft_tokens"]
PLACE_AND_PACE += ["max_skipped_share", "verify", "datasets"]


@dataclass(frozen=True)
class LabelJob:
    """One dataset to label."""

    config: PseudoLabelConfig
    utterances: Dataset
    store: LabelStore
    states: Path | None = None
    """Folder for the encoder's output, a file per shard, written before the shard."""
    lacks: Callable[[str | None], str | None] = lambda language: None
    """Why the teacher cannot transcribe a language (None: detected); None where it can."""

    @property
    def count(self) -> int | None:
        """Number of utterances; None for a stream."""
        return None if isinstance(self.utterances, UtteranceStream) else len(self.utterances)

    def shard(self, number: int) -> Iterator[Utterance]:
        """The utterances of a shard."""
        size = self.config.shard_size
        return islice(self.utterances.iter_from(number * size), size)


def prepare(config: PseudoLabelConfig) -> tuple[list[LabelJob], Checkpoint]:
    """A job for each dataset of `config`, with its store opened, and the teacher.

    Uses no accelerator. Raises InputError for a configuration, dataset or teacher that cannot be
    used, and for a store that was begun with other settings.
    """
    for name in ("batch_size", "shard_size", "workers", "max_tokens", "beams"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}: use 1 or more")
    if config.draft_tokens != PseudoLabelConfig.draft_tokens and not config.assistant:
        raise InputError("--draft-tokens has no effect without --assistant: add one")
    datasets = [(one, windows(one)) for one in by_dataset(config)]
    checkpoint = load_checkpoint(config.model)
    tokens, weights = checkpoint.tokens(), fingerprint(checkpoint.params)
    jobs = []
    for one, utterances in datasets:
        chosen = settings(one, utterances, weights, tokens.vocabulary, checkpoint.dims.width)
        store = open_store(one.output_dir, chosen)
        encoder = checkpoint.params["encoder"]
        states = one.audio_states and states_folder(one.audio_states, encoder, store.settings)
        lacks = partial(tokens.unsupported, task=one.task)
        jobs.append(LabelJob(one, utterances, store, states, lacks))
    return jobs, checkpoint


def by_dataset(config: PseudoLabelConfig) -> list[PseudoLabelConfig]:
    """A configuration for each dataset. Several have stores inside `output_dir`, named by source,
    configuration and split.

    Raises InputError where two have the same name, or where flags change one of several datasets.
    """
    if not config.datasets:
        return [config]
    if config.data != config.datasets[0]:
        raise InputError(
            f"the recipe names {len(config.datasets)} datasets, and flags change only the first: "
            "change the [[pseudo-label.data]] tables instead"
        )
    named: dict[str, PseudoLabelConfig] = {}
    for data in config.datasets:
        parts = (Path(data.source).stem, data.config, data.split)
        name = "-".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
        if name in named:
            raise InputError(f"two datasets are called {name}: label one of them separately")
        folder = config.output_dir / name
        named[name] = dataclasses.replace(config, data=data, datasets=(), output_dir=folder)
    return list(named.values())


def windows(config: PseudoLabelConfig) -> Dataset:
    """The dataset's utterances, packed into windows where `pack_seconds` is set.

    Raises InputError for windows longer than 30 s, and for packing a stream, whose durations and
    speakers are not known before it is read.
    """
    utterances, seconds = read_dataset(config.data), config.pack_seconds
    if seconds is None:
        return utterances
    if isinstance(utterances, UtteranceStream):
        raise InputError("a stream cannot be packed: leave out --streaming or --pack-seconds")
    return pack(utterances, seconds, config.pack_pause)


def settings(
    config: PseudoLabelConfig, utterances: Dataset, weights: str, vocabulary: int, width: int = 0
) -> dict[str, Any]:
    """Everything that determines the labels of a store.

    weights: fingerprint of the teacher. vocabulary: number of its tokens. width: of its decoder.
    """
    fields = dataclasses.asdict(config) | {"teacher_states": config.teacher_states and width}
    without = PLACE_AND_PACE if config.teacher_states else [*PLACE_AND_PACE, "teacher_states"]
    size = None if isinstance(utterances, UtteranceStream) else len(utterances)
    kept = {name: value for name, value in fields.items() if name not in without}
    return {"weights": weights, "vocabulary": vocabulary, "utterances": size, **kept}


def fingerprint(params: Any) -> str:
    """A hash of names, shapes and the first 256 numbers of every array."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        head = np.asarray(leaf.reshape(-1)[:256], np.float32)
        digest.update(f"{path}{leaf.shape}".encode() + head.tobytes())
    return digest.hexdigest()[:16]


def states_folder(folder: Path, encoder: Any, settings: Mapping[str, Any]) -> Path:
    """Where the outputs of this encoder are for the clips of a label store, filtered or not."""
    unfiltered = {name: value for name, value in settings.items() if name != "filter"}
    contents = json.dumps(unfiltered, sort_keys=True).encode()
    return folder / fingerprint(encoder) / hashlib.sha256(contents).hexdigest()[:16]
