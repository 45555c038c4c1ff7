"""TPU slices by Google's names, what a chip of each generation has, and devices to compile for.

Compiling needs libtpu (the extra `tpu`) and no TPU.
"""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flax_distil.errors import InputError
from flax_distil.parallel.chips import TPUS

GIB = 2.0**30

# For libtpu on a machine without a TPU: no requests to Google's metadata server, no lock of the
# chips, and no long errors about both.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: the compiler gets the real one
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Chip:
    """One TPU chip.

    flops: peak FLOP/s in bfloat16. memory: bytes of HBM. bandwidth: bytes/s of HBM.
    links: bytes/s to neighbouring chips, all links together, one direction.
    cores: how many a slice's name counts for each chip.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    cores: int
    dimensions: int


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in November 2026; v4's links are from Jouppi
# et al. 2023 (arXiv 2304.01433): 6 of 50 GB/s.
CHIPS = {
    "v4": Chip(TPUS["v4"].bfloat16, 32 * GIB, 1200e9, 300e9, cores=2, dimensions=3),
    "v5e": Chip(TPUS["v5e"].bfloat16, 16 * GIB, 819e9, 200e9, cores=1, dimensions=2),
    "v5p": Chip(TPUS["v5p"].bfloat16, 95 * GIB, 2765e9, 600e9, cores=2, dimensions=3),
    "v6e": Chip(TPUS["v6e"].bfloat16, 32 * GIB, 1638e9, 400e9, cores=1, dimensions=2),
}


@dataclass(frozen=True)
class Slice:
    """Chips that are rented together; `layout` is how they are wired, such as 2x2x1."""

    name: str
    generation: str
    chips: int
    layout: str

    @property
    def chip(self) -> Chip:
        """What each of its chips has."""
        return CHIPS[self.generation]

    @property
    def host_chips(self) -> int:
        """Chips of one host: all 8 of a v5e-8 or v6e-8, else 4."""
        return self.chips if self.chip.dimensions == 2 and self.chips <= 8 else 4


def tpu_slice(name: str) -> Slice:
    """The slice of a name: v4 and v5p count cores (two a chip), v5e and v6e count chips.

    Raises:
        InputError: there is no such generation or size.
    """
    generation, _, count = name.replace("v5litepod", "v5e").partition("-")
    if generation not in CHIPS or not count.isdigit():
        raise InputError(
            f"{name} is not a TPU slice that can be planned: name one of {', '.join(CHIPS)} and "
            "its size, such as v4-8 or v5e-256"
        )
    chip = CHIPS[generation]
    chips, rest = divmod(int(count), chip.cores)
    most = 256 if chip.dimensions == 2 else 2048
    if rest or chips & (chips - 1) or not 4 <= chips <= most:
        raise InputError(
            f"{name} would have {int(count) / chip.cores:g} chips: planned are 4, 8, 16, … {most}, "
            f"so {generation}-{4 * chip.cores} to {generation}-{most * chip.cores}"
        )
    return Slice(f"{generation}-{count}", generation, chips, layout(chips, chip.dimensions))


def layout(chips: int, dimensions: int) -> str:
    """Sides as equal as powers of two allow, short ones first; Google's 2x2x1 is the exception."""
    doublings = chips.bit_length() - 1
    sides = sorted(1 << (doublings + axis) // dimensions for axis in range(dimensions))
    return "x".join(map(str, sides if 1 not in sides else sides[::-1]))


def without_tpu() -> None:
    """Prepares the environment for compiling; to be called before jax is used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)


def devices(wanted: Slice) -> list[Any]:
    """One device a chip, which programs can be compiled for and nothing can run on.

    Raises:
        InputError: libtpu is not installed.
    """
    from jax.experimental import topologies

    # Of v4, two cores are one device, as on a TPU VM.
    megacore = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1}
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{wanted.generation}:{wanted.layout}",
            **(megacore if wanted.generation == "v4" else {}),
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if not libtpu_version():
            raise InputError(
                "planning needs libtpu, which compiles for TPUs on any x86-64 Linux machine: "
                "pip install 'flax-distil[tpu]'"
            ) from None
        raise InputError(f"libtpu has no topology for {wanted.name}: {error}") from error
    return list(found.devices)


def libtpu_version() -> str | None:
    """The installed compiler's version, if any."""
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return None
