"""Audio of any length to text with times (`transcribe`), many files (`run`), file formats."""

from flax_distil.options import ChunkedOptions, SequentialOptions, VoiceOptions
from flax_distil.transcription.files import run
from flax_distil.transcription.recordings import transcribe, transcribe_all
from flax_distil.transcription.transcript import Segment, Transcript, Word

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
