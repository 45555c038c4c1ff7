"""What tells label stores and teachers apart: settings and fingerprints."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.utterances import UtteranceStream

# Fields that do not change the labels.
PLACE_AND_PACE = ("batch_size", "workers", "output_dir", "engine", "ray_address", "ray_workers")
PLACE_AND_PACE += ("audio_states", "audio_states_dtype", "assistant", "draft_tokens")
PLACE_AND_PACE += ("max_skipped_share", "verify", "datasets")


def settings(
    config: PseudoLabelConfig,
    utterances: Sequence | UtteranceStream,
    weights: str,
    vocabulary: int,
    width: int = 0,
) -> dict[str, Any]:
    """Everything that determines the labels of a store.

    weights: fingerprint of the teacher. vocabulary: number of its tokens. width: of its decoder.
    """
    fields = dataclasses.asdict(config) | {"teacher_states": config.teacher_states and width}
    for name in (*PLACE_AND_PACE, *(() if config.teacher_states else ("teacher_states",))):
        del fields[name]
    size = None if isinstance(utterances, UtteranceStream) else len(utterances)
    return {"weights": weights, "vocabulary": vocabulary, "utterances": size, **fields}


def fingerprint(params: Any) -> str:
    """A hash of names, shapes and the first 256 numbers of every array."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ):
        head = np.asarray(leaf.reshape(-1)[:256], np.float32)
        digest.update(f"{path}{leaf.shape}".encode() + head.tobytes())
    return digest.hexdigest()[:16]


def states_folder(folder: Path, encoder: Any, settings: Mapping[str, Any]) -> Path:
    """Where the outputs of this encoder are for the clips of a label store, filtered or not."""
    unfiltered = {name: value for name, value in settings.items() if name != "filter"}
    contents = json.dumps(unfiltered, sort_keys=True).encode()
    return folder / fingerprint(encoder) / hashlib.sha256(contents).hexdigest()[:16]
