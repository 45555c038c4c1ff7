"""Export to other programs' formats (`formats`), with a model card and verification."""

from flax_distil.export.formats import run

__all__ = ["run"]
