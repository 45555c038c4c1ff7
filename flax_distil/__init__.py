"""Distil-Whisper (arXiv 2311.00430) in JAX and Flax: label, filter, distil, judge, export.

The public names, imported when they are first used, so that `import flax_distil` is instant.
Every stage has `run(config)` in its room; `flax_distil.transcribe` has `transcribe`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_distil.audio.load import load_audio
    from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
    from flax_distil.decode.search import Hypothesis
    from flax_distil.errors import InputError
    from flax_distil.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from flax_distil.model.student import init_student
    from flax_distil.options import DecodeOptions

__all__ = [
    "Checkpoint",
    "DecodeOptions",
    "Hypothesis",
    "InputError",
    "Recognizer",
    "init_student",
    "load_audio",
    "load_checkpoint",
    "make_recognizer",
    "recognize",
    "save_checkpoint",
]

_HOMES = {
    "flax_distil.audio.load": ("load_audio",),
    "flax_distil.decode.search": ("Hypothesis",),
    "flax_distil.decode.recognizer": ("Recognizer", "make_recognizer", "recognize"),
    "flax_distil.errors": ("InputError",),
    "flax_distil.model.checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "flax_distil.model.student": ("init_student",),
    "flax_distil.options": ("DecodeOptions",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
