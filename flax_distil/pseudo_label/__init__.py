"""A teacher labels a dataset (`labeller`), into a `store` that `filter` keeps the best of."""

from flax_distil.pseudo_label.labeller import LabelSummary, run
from flax_distil.pseudo_label.store import PseudoLabel

__all__ = ["LabelSummary", "PseudoLabel", "run"]
