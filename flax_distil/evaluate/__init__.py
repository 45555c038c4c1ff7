"""Evaluate models on the same clips: `evaluator` runs them, `report` holds the results."""

from flax_distil.evaluate.evaluator import run
from flax_distil.evaluate.report import ClipResult, DatasetResult, ModelResult, Report

__all__ = ["ClipResult", "DatasetResult", "ModelResult", "Report", "run"]
