"""The model card: what the model is, its recipe, its figures and its use."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tomlkit
from huggingface_hub import ModelCardData

from flax_distil.config import DistillConfig, ExportConfig
from flax_distil.distill.runs import RECIPE, flat, is_run, read_run
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import PUBLISHED
from flax_distil.pseudo_label.store import SETTINGS, read_settings
from flax_distil.recipe import load_recipe

SOUND = 'sound, rate = soundfile.read("speech.wav", dtype="float32")  # one channel, 16 kHz\n'
# Format → library, imports and last lines of an example, and what a student that was trained
# without timestamps needs in it, else what others take.
USES = {
    "transformers": (
        "transformers",
        "import soundfile\nfrom transformers import pipeline\n",
        'recognise = pipeline("automatic-speech-recognition", model="{folder}")\n'
        'print(recognise({{"raw": sound, "sampling_rate": rate}}, {option})["text"])\n',
        ("chunk_length_s=15", "return_timestamps=True"),
    ),
    "openai": (
        "whisper",
        "import soundfile\nimport whisper\n",
        'model = whisper.load_model("{folder}/model.pt")\n'
        'print(model.transcribe(sound, without_timestamps={option})["text"])\n',
        ("True", "False"),
    ),
    "ctranslate2": (
        "ctranslate2",
        "import soundfile\nfrom faster_whisper import WhisperModel\n",
        'model = WhisperModel("{folder}")\n'
        "segments, _ = model.transcribe(sound, without_timestamps={option})\n"
        'print("".join(segment.text for segment in segments))\n',
        ("True", "False"),
    ),
}


def model_card(checkpoint: Checkpoint, config: ExportConfig, format: str, folder: Path) -> str:
    """A README.md for the hub: YAML head, sizes, recipe, figures, example.

    Figures are those of the report, else of the run's validation. format, folder: of the export.

    Raises:
        InputError: the report or the run cannot be read.
    """
    dims, generation, run = checkpoint.dims, checkpoint.generation, Path(config.source).expanduser()
    trained = load_recipe(run / RECIPE, DistillConfig) if is_run(run) else None
    base = hub_name(trained.teacher if trained else config.source)
    data = training_data(trained) if trained else []
    parameters = sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params))
    library, imports, last_lines, options = USES[format]
    timed = generation.get("trained_with_timestamps") is not False
    several = "multilingual" if generation.get("is_multilingual") else "en"
    head = ModelCardData(
        language=generation.get("language", several).strip("<|>"),
        license=config.license,
        base_model=base,
        datasets=[name for name in data if name.count("/") == 1] or None,
        library_name=library,
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distil-whisper", "flax-distil"],
        metrics=["wer"],
    )
    about = [
        f"Whisper with {dims.encoder_layers} encoder and {dims.decoder_layers} decoder layers, "
        f"width {dims.width}, {parameters / 1e6:.1f} M parameters, exported from "
        f"`{shown(config.source)}` by flax-distil {version('flax-distil')} "
        "(Distil-Whisper, arXiv 2311.00430, in JAX)."
    ]
    if base:
        licence = ", whose licence is MIT" if base.startswith("openai/") else ""
        about.append(f"Its weights were made from those of {base}{licence}.")
    if data:
        about.append(f"Training data: {', '.join(data)}.")
    if not timed:
        about.append(
            "It was trained without timestamps: long recordings are to be transcribed in "
            "overlapping chunks, not with Whisper's sequential algorithm."
        )
    last_lines = last_lines.format(folder=folder, option=options[timed])
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {config.output_dir.name}\n",
        f"{' '.join(about)}\n",
        recipe(trained) if trained else "",
        figures(config.report) if config.report else validation(run) if trained else "",
        f"## Use\n\n```python\n{imports}\n{SOUND}{last_lines}```\n",
    ]
    return "\n".join(part for part in parts if part)


def hub_name(name: str) -> str | None:
    """A model's name on the hub: as it is, or of a fetched one (whisper-base); None for others."""
    if name.count("/") == 1 and not (Path(name).exists() or name.startswith(("/", ".", "runs/"))):
        return name.partition("@")[0]
    last = Path(name).name
    return f"openai/{last}" if last.removeprefix("whisper-") in PUBLISHED and "-" in last else None


def training_data(config: DistillConfig) -> list[str]:
    """Names of the datasets that a run was trained on; those behind label stores that are there."""
    names = []
    for source in (*config.labels, *(one.source for one in config.data)):
        known = (Path(source) / SETTINGS).is_file()
        behind = read_settings(Path(source)).get("data", {}).get("source") if known else None
        names.append(shown(behind or source))
    return list(dict.fromkeys(names))


def recipe(config: DistillConfig) -> str:
    """The settings of training that differ from the defaults, as a section."""
    usual = flat(DistillConfig("", "", Path()))
    changed = [
        (name, shown(value))
        for name, value in flat(config).items()
        if value != usual[name] and not name.startswith(("output_dir", "run.", "student"))
    ]
    document = tomlkit.document()
    for name, value in sorted(changed, key=lambda one: isinstance(one[1], list)):  # tables last
        document.append(tomlkit.key(name.split(".")), tomlkit.item(value))
    return f"## Recipe\n\n```toml\n{tomlkit.dumps(document)}```\n"


def shown(value: Any) -> Any:
    """A setting for others' eyes: paths of this machine as names, tables without defaults."""
    if dataclasses.is_dataclass(value):
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        return {k: shown(v) for k, v in vars(value).items() if v != defaults[k]}
    if isinstance(value, tuple):
        return list(map(shown, value))
    if isinstance(value, str | Path):
        return Path(value).name if Path(value).is_absolute() else str(value)
    return "None" if value is None else value


def validation(run: Path) -> str:
    """The best error rate of a run's validation as a section; nothing where there was none."""
    found = read_run(run, run)
    if found["wer"] is None:
        return ""
    rate, step = f"{found['wer']:.1f} %", f"{found['wer_step']:,}"
    return f"## Figures\n\nError rate in validation: {rate} after {step} updates.\n"


def figures(report: Path) -> str:
    """The report's models as a table.

    Raises:
        InputError: `report` is not a report.json of `flax-distil evaluate`.
    """
    rows = ["| model | parameters | WER % | RTF | speed |", "|---|---:|---:|---:|---:|"]
    try:
        models = json.loads(report.read_text(encoding="utf-8"))["models"]
        for model in models:
            rows.append(
                f"| {model['name']} | {model['parameters'] / 1e6:.1f} M | {model['wer']:.1f} | "
                f"{model['rtf']:.3f} | {model['relative_speed']:.2f}× |"
            )
        data = dict.fromkeys(one["name"] for model in models for one in model["datasets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{report} is not a report.json of flax-distil evaluate: {error!r}"
        ) from None
    note = "RTF is processing time over audio time."
    return "\n".join(["## Figures", "", *rows, "", f"Measured on {', '.join(data)}. {note}", ""])
