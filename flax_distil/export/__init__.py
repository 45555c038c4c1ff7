"""Hand over: a model in the formats of other programs (`formats`), its card, and the proof."""

from flax_distil.export.formats import run

__all__ = ["run"]
