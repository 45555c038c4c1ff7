"""What a finished or running run has to give: its recipe and its student."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flax_distil.config import DistillConfig
from flax_distil.distill.checkpoints import read_params
from flax_distil.distill.setup import trainable_part, trained_checkpoint
from flax_distil.errors import InputError, read_json
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.recipe import load_recipe

RECIPE, VERSIONS = "recipe.toml", "versions.json"


def is_run(folder: Path) -> bool:
    """Whether this is a training run's folder."""
    return (folder / RECIPE).is_file()


def trained_student(
    run: Path, which: Literal["best", "latest"] | int = "best"
) -> tuple[int, Checkpoint]:
    """The step and the whole student of a run's checkpoint, with tokenizer and configurations.

    What was not trained comes from the student the run began with, as its recipe names it. A
    multilingual one that was trained on one language and task has both in its generation config.

    Raises:
        InputError: the folder is no run, has no such checkpoint, or that student is gone.
    """
    if not is_run(run):
        raise InputError(f"{run} has no {RECIPE}: it is no training run")
    config = load_recipe(run / RECIPE, DistillConfig)
    student = load_checkpoint(config.student, config.student_revision)
    scanned = config.compute.scan_layers
    like = trainable_part(student.params, config.train_encoder, scanned)
    step, trained = read_params(run, like, which)
    student = trained_checkpoint(trained, student, scanned)
    return step, replace(student, generation=generation_of(run, student))


def generation_of(run: Path, student: Checkpoint) -> dict[str, Any]:
    """The generation config of a run's student: with the language and task of its data, where it
    is multilingual and there was one of each; and without the text before in long recordings,
    where it was trained without any (`condition_on_prev_tokens`, as Transformers calls it)."""
    facts = read_json(run / VERSIONS) if (run / VERSIONS).is_file() else {}
    languages, tasks = facts.get("languages") or [], facts.get("tasks") or []
    generation = dict(student.generation)
    if facts.get("previous_text") is False:
        generation["condition_on_prev_tokens"] = False
    multilingual = generation.get("is_multilingual", student.dims.multilingual)
    if multilingual and len(languages) == len(tasks) == 1:
        generation.pop("forced_decoder_ids", None)
        generation |= {"language": f"<|{languages[0]}|>", "task": tasks[0]}
    return generation
