"""Write: audio of any length to text with times (`transcribe`), many files (`run`), formats."""

from flax_distil.transcribe.files import run
from flax_distil.transcribe.options import ChunkedOptions, SequentialOptions
from flax_distil.transcribe.recordings import transcribe, transcribe_all
from flax_distil.transcribe.result import Segment, Transcript, Word
from flax_distil.transcribe.voice import VoiceOptions

__all__ = [
    "ChunkedOptions",
    "Segment",
    "SequentialOptions",
    "Transcript",
    "VoiceOptions",
    "Word",
    "run",
    "transcribe",
    "transcribe_all",
]
