"""The teacher over a dataset (`labeller`) → Parquet shards (`store`) → the best (`filter`)."""

from flax_distil.pseudo_label.labeller import LabelSummary, run
from flax_distil.pseudo_label.store import PseudoLabel

__all__ = ["LabelSummary", "PseudoLabel", "run"]
