"""Where downloads and compiled programs are kept between runs."""

import math
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder `FLAX_DISTIL_CACHE` names, else `~/.cache/flax-distil`; it may not exist yet."""
    named = os.environ.get("FLAX_DISTIL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "flax-distil"


def model_folder(name: str) -> Path:
    """Where a model fetched under a short name, such as whisper-tiny.en, lies."""
    return cache_folder() / "models" / name


def keep_programs() -> None:
    """Let JAX keep compiled programs in the cache, so that the next run starts at once.

    To be called before jax is imported; JAX's own variables, where set, win.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def compile_aside(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """Compiles what JAX is not to keep: it cannot read programs for chips that are not here."""
    import jax

    kept = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, kept)
    jax.config.update(kept, math.inf)
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(kept, seconds)
