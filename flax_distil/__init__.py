"""Distil-Whisper (arXiv 2311.00430) in JAX and Flax: label, filter, distil, evaluate, export.

The public names are imported when they are first used, so that `import flax_distil` is instant.
Every stage of the command line is also a function `run(config)` of its package.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_distil.audio.load import load_audio
    from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
    from flax_distil.decode.search import Hypothesis
    from flax_distil.errors import InputError
    from flax_distil.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from flax_distil.model.student import init_student
    from flax_distil.options import ChunkedOptions, DecodeOptions, SequentialOptions, VoiceOptions
    from flax_distil.text.wer import error_rate
    from flax_distil.transcription.recordings import transcribe
    from flax_distil.transcription.transcript import Transcript

_MODULES = {
    "Checkpoint": "model.checkpoint",
    "ChunkedOptions": "options",
    "DecodeOptions": "options",
    "Hypothesis": "decode.search",
    "InputError": "errors",
    "Recognizer": "decode.recognizer",
    "SequentialOptions": "options",
    "Transcript": "transcription.transcript",
    "VoiceOptions": "options",
    "error_rate": "text.wer",
    "init_student": "model.student",
    "load_audio": "audio.load",
    "load_checkpoint": "model.checkpoint",
    "make_recognizer": "decode.recognizer",
    "recognize": "decode.recognizer",
    "save_checkpoint": "model.checkpoint",
    "transcribe": "transcription.recordings",
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
