"""The cache of downloads and compiled programs."""

import math
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder of `FLAX_DISTIL_CACHE`, else `~/.cache/flax-distil`; it may not exist yet."""
    folder = os.environ.get("FLAX_DISTIL_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "flax-distil"


def model_folder(name: str) -> Path:
    """The folder of a model fetched by its short name, such as whisper-tiny.en."""
    return cache_folder() / "models" / name


def keep_programs() -> None:
    """Make JAX cache compiled programs, so that later runs start faster.

    Call it before jax is imported. JAX's own environment variables take precedence.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def compile_aside(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """Compile without JAX's cache, which cannot load programs for absent chips."""
    import jax

    option = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(option, seconds)
