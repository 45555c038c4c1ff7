#!/usr/bin/env python3
"""Distil a student from a Whisper teacher and its pseudo-labels: `flax-distil distill` as a script.

    python run_distill_flax.py --teacher whisper-base --student runs/student \
        --labels runs/filtered --output-dir runs/distill
    python run_distill_flax.py --recipe recipes/base-6-2.toml --run.resume auto
"""

import sys

from flax_distil.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
