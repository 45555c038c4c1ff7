"""The model card: what the model is, its recipe, its figures and its use."""

import json
from importlib.metadata import version
from pathlib import Path

import jax
from huggingface_hub import ModelCardData

from flax_distil.config import ExportConfig
from flax_distil.distill.runs import RECIPE
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint

USES = {  # format → library and example
    "transformers": (
        "transformers",
        """\
from transformers import pipeline

recognise = pipeline("automatic-speech-recognition", model="{folder}")
print(recognise("speech.wav")["text"])
""",
    ),
    "openai": (
        "whisper",
        """\
import whisper

model = whisper.load_model("{folder}/model.pt")
print(model.transcribe("speech.wav")["text"])
""",
    ),
    "ctranslate2": (
        "ctranslate2",
        """\
from faster_whisper import WhisperModel

segments, _ = WhisperModel("{folder}").transcribe("speech.wav")
print("".join(segment.text for segment in segments))
""",
    ),
}


def model_card(checkpoint: Checkpoint, config: ExportConfig, format: str, folder: Path) -> str:
    """A README.md for the hub: YAML head, sizes, recipe, figures of the report, example.

    format, folder: of the export.

    Raises:
        InputError: the report cannot be read.
    """
    dims = checkpoint.dims
    parameters = sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params))
    library, use = USES[format]
    head = ModelCardData(
        language="multilingual" if checkpoint.generation.get("is_multilingual") else "en",
        license=config.license,
        library_name=library,
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "distil-whisper", "flax-distil"],
        metrics=["wer"],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {config.output_dir.name}\n",
        f"Whisper with {dims.encoder_layers} encoder and {dims.decoder_layers} decoder layers, "
        f"width {dims.width}, {parameters / 1e6:.1f} M parameters, exported from "
        f"`{config.source}` by flax-distil {version('flax-distil')} "
        "(Distil-Whisper, arXiv 2311.00430, in JAX).\n",
        recipe(Path(config.source)),
        figures(config.report) if config.report else "",
        f"## Use\n\n```python\n{use.format(folder=folder)}```\n",
    ]
    return "\n".join(part for part in parts if part)


def recipe(run: Path) -> str:
    """The recipe as a section, if `run` is a training run."""
    if not (run / RECIPE).is_file():
        return ""
    text = (run / RECIPE).read_text(encoding="utf-8").strip()
    return f"## Recipe\n\n```toml\n{text}\n```\n"


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
    return "\n".join(["## Figures", "", *rows, "", f"Measured on {', '.join(data)}.", ""])
