"""Judge models side by side on the same clips: `judge` does it, `report` tells it."""

from flax_distil.evaluate.evaluator import run
from flax_distil.evaluate.report import ClipResult, DatasetResult, ModelResult, Report

__all__ = ["ClipResult", "DatasetResult", "ModelResult", "Report", "run"]
