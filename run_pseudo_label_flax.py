#!/usr/bin/env python
"""Label a dataset with a Whisper teacher: the same as `flax-distil pseudo-label`.

python run_pseudo_label_flax.py speech/ --model whisper-base --output-dir labels
"""

import sys

from flax_distil.cli import main

if __name__ == "__main__":
    sys.exit(main(["pseudo-label", *sys.argv[1:]]))
