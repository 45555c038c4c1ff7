"""The platforms that JAX searches for devices, set before it does."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Device files of TPUs (v2 to v4, later ones), of NVIDIA's GPUs (Windows' Linux too) and of AMD's.
ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "dxg", "kfd")

# What JAX sets itself as it is imported, on machines without TPUs.
JAX_SETS = {"TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"}


def name_platform(devices: Path = Path("/dev")) -> None:
    """Choose the CPU if nothing else is present: libtpu logs long errors without chips.

    JAX chooses by itself if an accelerator may be present, if its own variable or one of TPUs' is
    set, and without libtpu.
    """
    names = os.environ.keys() - JAX_SETS
    named = any(name.startswith(("JAX_PLATFORM", "JAX_FORCE_TPU", "TPU_")) for name in names)
    near = any(any(devices.glob(pattern)) for pattern in ACCELERATORS)
    if not named and not near and find_spec("libtpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if jax := sys.modules.get("jax"):  # which has read its variables
            jax.config.update("jax_platforms", "cpu")
