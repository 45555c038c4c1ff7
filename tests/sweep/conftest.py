"""A recipe with a sweep, and stages that write what a script says."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flax_distil import cli
from flax_distil.config import EvaluateConfig, FilterConfig, SweepConfig
from flax_distil.errors import InputError
from flax_distil.evaluate import html
from flax_distil.evaluate.results import ClipResult
from flax_distil.recipe import stage_name
from flax_distil.sweep import stages

RECIPE = """
[filter]
source = "labels"
output_dir = "runs/filtered"

[init-student]
teacher = "whisper-base"
output_dir = "runs/init"

[distill]
teacher = "whisper-base"
student = "./runs/init"
labels = ["runs/filtered/a", "other"]
output_dir = "runs/distill"

[export]
source = "runs/distill"
output_dir = "runs/distill/student"

[evaluate]
models = ["whisper-base", "runs/distill/student"]
datasets = ["clean.jsonl", "noisy.jsonl"]
resamples = 200
"""


@pytest.fixture
def sweep(tmp_path) -> Callable[..., SweepConfig]:
    """Makes the configuration of a sweep over fields, which are TOML."""

    def make(fields: str, *flags: str, recipe: str = RECIPE) -> SweepConfig:
        path = tmp_path / "sweep.toml"
        path.write_text(f"{recipe}\n[sweep.fields]\n{fields}\n")
        command = ["sweep", "--recipe", str(path), "--output-dir", str(tmp_path / "out")]
        return cli.parse([*command, *flags])

    return make


@dataclass
class Script:
    """Stages that only note that they ran. wrong: of ten one-word clips of each dataset, by run."""

    wrong: dict[str, tuple[int, int]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    killed_at: str = ""
    """The stage before which the process dies."""

    def __call__(self, config: Any) -> dict[str, Any]:
        folder: Path = config.output_dir
        name = f"{folder.parent.name}/{folder.name}"
        if name == self.killed_at:
            raise KeyboardInterrupt
        self.ran.append(name)
        if isinstance(config, FilterConfig):
            if config.max_wer == 1:
                raise InputError("none of 100 labels is kept")
            folder.mkdir(parents=True, exist_ok=True)
            return {"labels": 2 * int(config.max_wer or 50), "of": 100, "hours": 1.5}
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(config, EvaluateConfig):
            return {"loss": 0.5} if stage_name(type(config)) == "distill" else {}
        model = {"name": config.names[0], "parameters": 2_000_000, "rtf": 0.4, "wer": 0.0}
        parts: dict[str, Any] = dict.fromkeys(("substitutions", "deletions", "insertions"), 0.0)
        parts |= {"name": "clean", "clips": 10, "audio_seconds": 20.0}
        model |= {"interval": {"low": None}, "datasets": [parts], "relative_speed": 1.0}
        model |= {} if folder.name == "teacher" else {"rtf": 0.1}
        (folder / "results").mkdir(exist_ok=True)
        with (folder / "results" / "clips.jsonl").open("w") as file:
            counts = self.wrong.get(config.names[0], (0, 0))
            for dataset, wrong in zip(("clean", "noisy"), counts, strict=True):
                for test, setting in (
                    ("short", ""),
                    ("long", f"chunked, {config.chunk_lengths[0]:g} s"),
                ):
                    for number in range(10):
                        clip = ClipResult(
                            test=test,  # type: ignore[arg-type]
                            setting=setting,
                            dataset=dataset,
                            id=str(number),
                            speaker=None,
                            model=config.names[0],
                            language="en",
                            seconds=2.0,
                            reference="word",
                            text="word" if number >= wrong else "other",
                        )
                        file.write(json.dumps(asdict(clip)) + "\n")
        return {"models": [model], "settings": {"device": "pen and paper", "precision": ""}}


@pytest.fixture
def script(monkeypatch) -> Script:
    """The script that all stages follow."""
    script = Script()
    monkeypatch.setattr(stages, "execute", script)
    monkeypatch.setattr(stages.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(html, "figures", lambda _: ())  # they take seconds
    return script
