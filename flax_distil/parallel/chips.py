"""What devices have: published peaks, by the name that JAX gives a device, and free memory."""

import os
import re
from pathlib import Path
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense FLOP/s of one JAX device, sums in float32, without sparsity.

    float32: of products that are float32 throughout (`model/precision.py`): no TF32 on NVIDIA's
        chips, six passes in bfloat16 on TPUs.
    """

    bfloat16: float
    float32: float


def _tpu(flops: float) -> Peak:
    return Peak(flops, flops / 6)


# By chip: docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x}, read in November 2026. A JAX
# device is half a chip of v2, v3 and 7x.
TPUS = {
    "v2": _tpu(46e12 / 2),
    "v3": _tpu(123e12 / 2),
    "v4": _tpu(275e12),
    "v5e": _tpu(197e12),
    "v5p": _tpu(459e12),
    "v6e": _tpu(918e12),
    "7x": _tpu(2307e12 / 2),
}
KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "7x": "7x"}  # JAX's names for some

# NVIDIA's data sheets, their sparse peaks halved. Chips without units for bfloat16 compute it in
# float32. The first name that a device's name holds as a whole word counts.
GPUS = {
    "GB200": Peak(2500e12, 80e12),
    "B200": Peak(2250e12, 75e12),
    "H200 NVL": Peak(835.5e12, 60e12),
    "H200": Peak(989.4e12, 67e12),
    "H100 NVL": Peak(835.5e12, 60e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100": Peak(989.4e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "A40": Peak(149.7e12, 37.4e12),
    "A30": Peak(165e12, 10.3e12),
    "A10": Peak(125e12, 31.2e12),
    "A10G": Peak(70e12, 31.5e12),
    "L40S": Peak(362e12, 91.6e12),
    "L40": Peak(181e12, 90.5e12),
    "L4": Peak(121e12, 30.3e12),
    "RTX A6000": Peak(154.8e12, 38.7e12),
    "RTX 3090": Peak(71e12, 35.6e12),
    "RTX 4090": Peak(165.2e12, 82.6e12),
    "RTX 5090": Peak(209.5e12, 104.8e12),
    "V100": Peak(15.7e12, 15.7e12),
    "T4": Peak(8.1e12, 8.1e12),
}


def published_peak(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of one device of this kind in matrix products of `dtype`; None where not known.

    Parts of a chip (MIG) and laptops' chips, which have others' names, are not known.
    """
    if tpu := re.fullmatch(r"TPU ?(\w+( lite)?)", device_kind):
        peak = TPUS.get(KINDS.get(tpu[1], tpu[1]))
    elif re.search(r"\b(MIG|Laptop|Max-Q)\b", device_kind):
        peak = None
    else:
        found = (GPUS[name] for name in GPUS if re.search(rf"\b{name}\b", device_kind))
        peak = next(found, None)
    return peak and getattr(peak, dtype)


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be allocated on the first device; for a CPU, on this machine.

    cgroup: of the container, whose limit counts as well.
    """
    import jax  # not above: plan sets variables that jax reads as it is imported

    device = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in device:
        return device["bytes_limit"] - device["bytes_in_use"]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if Path("/proc/meminfo").is_file():  # Linux
        available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(available[1]) if available else free
    limit = cgroup / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        used = int((cgroup / "memory.current").read_text())
        cached = re.search(r"inactive_file (\d+)", (cgroup / "memory.stat").read_text())
        free = min(free, int(most) - used + int(cached[1] if cached else 0))
    return free
