"""Models on the same audio: error rates, long recordings, noise, hallucination, speed; reports."""

from flax_distil.evaluate.evaluator import evaluate_models, run
from flax_distil.evaluate.report import Report

__all__ = ["Report", "evaluate_models", "run"]
