"""What a finished or running run has to give: its recipe and its student."""

from pathlib import Path
from typing import Literal

from flax_distil.config import DistillConfig
from flax_distil.distill.checkpoints import read_params
from flax_distil.distill.setup import trainable_part, trained_checkpoint
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.recipe import load_recipe

RECIPE = "recipe.toml"


def is_run(folder: Path) -> bool:
    """Whether this is a training run's folder."""
    return (folder / RECIPE).is_file()


def trained_student(
    run: Path, which: Literal["best", "latest"] | int = "best"
) -> tuple[int, Checkpoint]:
    """The step and the whole student of a run's checkpoint, with tokenizer and configurations.

    What was not trained comes from the student the run began with, as its recipe names it.

    Raises:
        InputError: the folder is no run, has no such checkpoint, or that student is gone.
    """
    if not is_run(run):
        raise InputError(f"{run} has no {RECIPE}: it is no training run")
    config = load_recipe(run / RECIPE, DistillConfig)
    student = load_checkpoint(config.student)
    scanned = config.compute.scan_layers
    like = trainable_part(student.params, config.train_encoder, scanned)
    step, trained = read_params(run, like, which)
    return step, trained_checkpoint(trained, student, scanned)
