"""Write: audio of any length to text with times (`transcribe`), many files (`run`), formats."""

from flax_distil.transcribe.files import run
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.windows import transcribe

__all__ = ["Segment", "Transcript", "run", "transcribe"]
