"""Write: audio of any length to text with times (`transcribe`), many files (`run`), formats."""

from flax_distil.transcribe.chunked import ChunkedOptions
from flax_distil.transcribe.files import run
from flax_distil.transcribe.recordings import transcribe, transcribe_all
from flax_distil.transcribe.result import Segment, Transcript, Word
from flax_distil.transcribe.sequential import SequentialOptions

__all__ = [
    "ChunkedOptions",
    "Segment",
    "SequentialOptions",
    "Transcript",
    "Word",
    "run",
    "transcribe",
    "transcribe_all",
]
