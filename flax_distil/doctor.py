"""`flax-distil doctor`: what this installation can do on this machine, and what is missing."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from flax_distil.cache import cache_folder
from flax_distil.config import DoctorConfig
from flax_distil.errors import SomeFailed

EXTRAS = {
    "tpu": "train and label on TPUs, plan for them, gs:// buckets",
    "cuda": "train and label on NVIDIA GPUs",
    "torch": "export --verify, pytorch_model.bin, OpenAI's .pt files",
    "ray": "label on several machines",
    "vad": "transcribe --vad",
    "wandb": "log to Weights & Biases",
    "demo": "synthesise the demo's speech",
}
CODECS = ("mp3", "aac", "opus", "vorbis", "flac", "pcm_s16le", "amrnb", "g722", "wmav2")
GIBI = 2**30
LITTLE_DISK = 10 * GIBI  # large-v2 in float32 takes 6 GiB
Status = Literal["ok", "missing", "broken"]


class Finding(NamedTuple):
    """A line of the report. remedy: what to do, where something is missing or broken."""

    topic: str
    status: Status
    found: str
    remedy: str = ""


def run(config: DoctorConfig) -> None:
    """Print what was found.

    Raises:
        SomeFailed: something is broken that every command needs.
    """
    findings = list(examine(config.network))
    if config.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for topic, status, found, remedy in findings:
            mark = {"ok": " ", "missing": "-", "broken": "!"}[status]
            print(f"{mark} {topic:<9} {found}")
            if remedy:
                print(f"{'':<12}{remedy}")
    if broken := [finding.topic for finding in findings if finding.status == "broken"]:
        raise SomeFailed(f"broken: {', '.join(broken)}")


def examine(network: bool = True) -> Iterator[Finding]:
    """All findings in turn. network: whether to look if the model hub can be reached."""
    names = ("flax-distil", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "datasets")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {packages}")
    yield devices()
    yield host()
    yield audio()
    yield cache()
    if network:
        yield hub()
    for extra, purpose in EXTRAS.items():
        yield extra_packages(extra, purpose)


def devices() -> Finding:
    """The devices that JAX uses, and accelerators that it does not."""
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        return Finding("devices", "broken", str(error).splitlines()[0], "unset JAX_PLATFORMS?")
    first = found[0]
    limit = (first.memory_stats() or {}).get("bytes_limit")
    memory = f", {limit / GIBI:.0f} GiB each" if limit else ""
    text = f"{len(found)} × {first.device_kind} ({first.platform}){memory}"
    if first.platform == "cpu":
        if Path("/dev/nvidia0").exists():
            remedy = "there is an NVIDIA GPU: pip install 'flax-distil[cuda]'"
            return Finding("devices", "missing", text, remedy)
        if any(Path("/dev").glob("accel*")):
            return Finding("devices", "missing", text, "is this a TPU? install 'flax-distil[tpu]'")
    return Finding("devices", "ok", text)


def host() -> Finding:
    """Cores, memory, and huge pages, which speed up decoding on CPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIBI
    text = f"{os.cpu_count()} cores, {memory:.0f} GiB of memory"
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_request = pages.is_file() and "[madvise]" in pages.read_text()
    if on_request and "hugetlb=1" not in os.environ.get("GLIBC_TUNABLES", ""):
        remedy = "for speed on the CPU: export GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
        return Finding("host", "ok", text, remedy)
    return Finding("host", "ok", text)


def audio() -> Finding:
    """PyAV, and the decoders of its FFmpeg."""
    import av

    lacking = []
    for name in CODECS:
        try:
            av.Codec(name, "r")
        except ValueError:
            lacking.append(name)
    if lacking:
        remedy = "such files cannot be read: pip install --force-reinstall av"
        text = f"PyAV {av.__version__} without {', '.join(lacking)}"
        return Finding("audio", "missing", text, remedy)
    return Finding("audio", "ok", f"PyAV {av.__version__} decodes {', '.join(CODECS)}")


def cache() -> Finding:
    """Whether the cache of models and compiled programs can be written, and the room for it."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set FLAX_DISTIL_CACHE to a folder that can be written"
        return Finding("cache", "broken", f"{folder}: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / GIBI:,.0f} GiB free"
    if free < LITTLE_DISK:
        return Finding("cache", "missing", text, f"large models need {LITTLE_DISK // GIBI} GiB")
    return Finding("cache", "ok", text)


def hub() -> Finding:
    """Whether the Hugging Face Hub can be reached, and as whom."""
    from huggingface_hub import constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "missing", "HF_HUB_OFFLINE is set", "models and data are folders")
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the HTTP library raises
        remedy = "without it, models and data are folders, or `flax-distil fetch`"
        text = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        return Finding("hub", "missing", text, remedy)
    token = "with a token" if get_token() else "without a token (hf auth login)"
    return Finding("hub", "ok", f"{constants.ENDPOINT} can be reached, {token}")


def extra_packages(extra: str, purpose: str) -> Finding:
    """Whether the packages of an extra are installed."""
    lacking = list(lacking_packages(extra))
    if not lacking:
        return Finding(extra, "ok", purpose)
    remedy = f"pip install 'flax-distil[{extra}]' ({', '.join(lacking)})"
    return Finding(extra, "missing", f"not installed: {purpose}", remedy)


def lacking_packages(extra: str) -> Iterable[str]:
    """Names of an extra's packages that are not installed, or in a version that is too old."""
    for line in requires("flax-distil") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if (
            marker is None
            or marker.evaluate({"extra": ""})
            or not marker.evaluate({"extra": extra})
        ):
            continue
        # jax[tpu] and jax[cuda12] are jax with a plugin, which jax itself does not need.
        plugins = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
        names = [plugins[one] for one in requirement.extras if one in plugins]
        for name in names or [requirement.name]:
            try:
                installed = version(name)
            except PackageNotFoundError:
                yield name
                continue
            if not names and not requirement.specifier.contains(installed, prereleases=True):
                yield f"{requirement}, not {installed}"
