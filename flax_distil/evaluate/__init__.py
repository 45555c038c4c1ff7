"""Judge models side by side on the same clips: `judge` does it, `report` tells it."""

from flax_distil.evaluate.judge import run
from flax_distil.evaluate.report import Entry, Judged, Report, Score

__all__ = ["Entry", "Judged", "Report", "Score", "run"]
