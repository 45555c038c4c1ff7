"""A run's folder: how it is begun or resumed, the student that it holds, and a table of many runs.

<run>/recipe.toml     the configuration
<run>/versions.json   versions, devices, commit, and facts of the training data
"""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flax_distil.config import DistillConfig, RunsConfig
from flax_distil.data.batches import label_ids
from flax_distil.data.loader import LoaderState
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import Utterances, UtteranceStream
from flax_distil.distill.check import datasets_of, knows_previous
from flax_distil.distill.checkpoints import (
    LATEST,
    Checkpoints,
    RunProgress,
    has_checkpoints,
    read_params,
    steps,
)
from flax_distil.distill.setup import trainable_part, trained_checkpoint
from flax_distil.distill.step import TrainState
from flax_distil.distill.tracking import METRICS, environment, read_metrics
from flax_distil.errors import InputError, read_json, writing
from flax_distil.files import remove_partial, write_changed
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.parallel.multihost import barrier, is_main_host
from flax_distil.recipe import load_recipe, save_recipe
from flax_distil.terminal import print_table
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)

SAMPLED_LABELS = 64  # of each source, for `teaches_timestamps`
RECIPE, VERSIONS = "recipe.toml", "versions.json"
# Fields that may change when a run resumes.
CHANGEABLE = {"output_dir", "compute", "validation", "run", "max_skipped", "max_skipped_share"}


def begin_or_resume(
    config: DistillConfig, checkpoints: Checkpoints, state: TrainState, facts: Mapping[str, Any]
) -> tuple[TrainState, RunProgress]:
    """The state and progress to start from; recipe and versions are written.

    facts: are written beside the versions.

    Raises:
        InputError: the run was begun with another recipe, or its checkpoint cannot be read.
    """
    progress = RunProgress(LoaderState(seed=config.seed))
    if has_checkpoints(config.output_dir):
        begun = check_recipe(config)
        state, progress = checkpoints.restore(state)
        if validation_clips(begun) != validation_clips(config):  # of which the best is not known
            progress = replace(progress, best_wer=None, best_step=None, since_best=0)
        log.info("continuing %s after step %d", config.output_dir, int(state.step))
    checkpoints.forget_best_after(int(state.step))
    barrier(f"{config.output_dir} at step {int(state.step)}")  # all have read what is written now
    if is_main_host():
        with writing(config.output_dir):
            remove_partial(config.output_dir)
            save_recipe(config, config.output_dir / RECIPE)
            versions = json.dumps(environment() | dict(facts), indent=2)
            write_changed(config.output_dir / VERSIONS, versions + "\n")
    return state, progress


def check_recipe(config: DistillConfig) -> DistillConfig:
    """The recipe that a run was begun with. Raises InputError if it trains by other numbers."""
    begun = load_recipe(config.output_dir / RECIPE, DistillConfig)
    before, now = flat(begun), flat(config)
    changed = [
        f"{name} (was {before[name]}, is {value})"
        for name, value in now.items()
        if value != before[name] and name.split(".")[0] not in CHANGEABLE
    ]
    if changed:
        raise InputError(
            f"{config.output_dir} was begun with another recipe: {'; '.join(changed)}. Resume with "
            "the same, or begin a new run"
        )
    return begun


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by their full names, such as `loss.kl`."""
    values: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            values |= flat(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def validation_clips(config: DistillConfig) -> tuple[Any, ...]:
    """What word error rates of different steps must have in common to be compared."""
    validation = config.validation
    return validation.labels, validation.data, validation.max_clips


def training_facts(
    config: DistillConfig, sources: Sequence[TrainingSource], tokens: WhisperTokens
) -> dict[str, Any]:
    """What an exported student records of its training: languages and tasks, sorted, and whether
    some examples had the text before them as prompt, or timestamps. Languages are None if not all
    are known."""
    languages, tasks = set(), set()
    for source in sources:
        if not source.speech:
            continue
        tasks.add(source.options.task)
        default = source.options.language or (None if tokens.multilingual else "en")
        for utterances in datasets_of([source]):
            columns, named = utterances.columns, utterances.config.language or default
            if columns.language is None:
                languages.add(named)
            elif isinstance(utterances, Utterances):
                languages.update(one or named for one in set(utterances.column(columns.language)))
            else:  # a stream's rows are not read yet
                languages.add(None)
    codes = sorted(one for one in languages if one and not tokens.unsupported(one))
    return {
        "languages": None if None in languages else codes,
        "tasks": sorted(tasks),
        "previous_text": bool(config.prompt_probability) and any(map(knows_previous, sources)),
        "timestamps": any(teaches_timestamps(source, tokens) for source in sources),
    }


def teaches_timestamps(source: TrainingSource, tokens: WhisperTokens) -> bool:
    """Whether labels of a source have timestamps, by a sample of them; a stream's may have."""
    if not source.options.timestamp_probability or not source.speech:
        return False
    if isinstance(source.utterances, UtteranceStream):
        return source.options.target == "label"
    rows = np.linspace(0, len(source.utterances) - 1, SAMPLED_LABELS, dtype=int).tolist()
    samples = (source.utterances[row] for row in dict.fromkeys(rows))
    labels = (label_ids(one, tokens, source.options.target, one.language) for one in samples)
    return any(token in tokens.times for label in labels for token in label)


def is_run(folder: Path) -> bool:
    """Whether this is a training run's folder."""
    return (folder / RECIPE).is_file()


def trained_student(
    run: Path, which: Literal["best", "latest"] | int = "best"
) -> tuple[int, Checkpoint]:
    """The step and the whole student of a run's checkpoint, with tokenizer and configurations.

    What was not trained comes from the student that the run began with, named in its recipe.

    Raises:
        InputError: the folder is not a run, has no such checkpoint, or that student is gone.
    """
    if not is_run(run):
        raise InputError(f"{run} has no {RECIPE}: it is not a training run")
    config = load_recipe(run / RECIPE, DistillConfig)
    student = load_checkpoint(config.student)
    scanned = config.compute.scan_layers
    like = trainable_part(student.params, config.train_encoder, scanned)
    step, trained = read_params(run, like, which)
    student = trained_checkpoint(trained, student, scanned)
    generation = generation_of(run, student)
    if config.audio_context:
        generation["audio_context"] = list(config.audio_context)
    return step, replace(student, generation=generation)


def generation_of(run: Path, student: Checkpoint) -> dict[str, Any]:
    """The generation config of a run's student.

    A multilingual student of one language and task names both. One that was trained without
    previous text transcribes long recordings without it (`condition_on_prev_tokens`, as
    Transformers calls it), one without timestamps in overlapping chunks
    (`trained_with_timestamps`, which Transformers keeps and does not read).
    """
    facts = read_json(run / VERSIONS) if (run / VERSIONS).is_file() else {}
    languages, tasks = facts.get("languages") or [], facts.get("tasks") or []
    generation = dict(student.generation)
    if facts.get("previous_text") is False:
        generation["condition_on_prev_tokens"] = False
    if facts.get("timestamps") is False:
        generation["trained_with_timestamps"] = False
    multilingual = generation.get("is_multilingual", student.dims.multilingual)
    if multilingual and len(languages) == len(tasks) == 1:
        generation.pop("forced_decoder_ids", None)
        generation |= {"language": f"<|{languages[0]}|>", "task": tasks[0]}
    return generation


# --- many runs: `flax-distil runs` --------------------------------------------------------------


# Heading, figure of `read_run`, and format of the table's columns.
COLUMNS = (
    ("run", "name", ""),
    ("step", "step", ""),
    ("of", "steps", ""),
    ("saved", "saved", ""),
    ("loss", "loss", ".4f"),
    ("best WER %", "wer", ".2f"),
    ("at step", "wer_step", ""),
    ("samples/s", "samples_per_second", ".2f"),
    ("MFU", "mfu", ".1%"),
    ("skipped", "skipped", ""),
)


def run(config: RunsConfig) -> list[dict[str, Any]]:
    """Print all runs below a folder, the best first, and the fields in which their recipes differ.

    Raises InputError if there is no run, or for a recipe that cannot be read.
    """
    paths = (path.parent for path in config.folder.rglob(RECIPE))  # users keep recipes anywhere
    paths = [path for path in paths if (path / METRICS).is_file() or (path / LATEST).is_dir()]
    if not paths:
        raise InputError(f"{config.folder} has no training run: name the folder that holds some")
    unknown = float("inf")
    runs = sorted(
        (read_run(path, config.folder) for path in sorted(paths)),
        key=lambda one: [unknown if one[name] is None else one[name] for name in ("wer", "loss")],
    )
    recipes = [one["recipe"] for one in runs]
    differing = [n for n, value in recipes[0].items() if any(one[n] != value for one in recipes)]
    if config.json:
        print(json.dumps({"runs": runs, "differing": differing}, indent=2, default=str))
        return runs
    figures = [[(one[name], form) for _, name, form in COLUMNS] for one in runs]
    print_table(
        [heading for heading, _, _ in COLUMNS],
        [["" if cell is None else format(cell, form) for cell, form in row] for row in figures],
    )
    if differing:
        names = [one["name"] for one in runs]
        rows = [[name, *(str(one[name]) for one in recipes)] for name in differing]
        print_table(["recipes differ in", *names], rows)
    return runs


def read_run(path: Path, root: Path) -> dict[str, Any]:
    """The figures of the run in `path`; None for those that it did not get to.

    step, steps: updates that were made and asked for. saved: update of the latest checkpoint. loss:
    mean over the last tenth of the updates. wer: the best macro-average, in percent. skipped:
    updates that were not finite. recipe: all fields but those of where the run is kept.
    """
    config, lines = load_recipe(path / RECIPE, DistillConfig), read_metrics(path / METRICS)

    def known(name: str) -> list[Any]:
        return [line[name] for line in lines if line.get(name) is not None]

    losses, median = known("loss"), lambda values: statistics.median(values) if values else None
    tail = losses[-max(len(losses) // 10, 1) :]
    found = [(one.get("validation/wer"), one["step"]) for one in lines]
    wer, wer_step = min((one for one in found if one[0] is not None), default=(None, None))
    return {
        "name": path.name if path == root else path.relative_to(root).as_posix(),
        "step": max(known("step"), default=0),
        "steps": config.optimizer.steps,
        "saved": max(steps(path / LATEST), default=None),
        "loss": statistics.mean(tail) if tail else None,
        "wer": wer,
        "wer_step": wer_step,
        "samples_per_second": median(known("samples_per_second")),
        "mfu": median(known("mfu")),
        "skipped": int(max(known("skipped"), default=0)),
        "recipe": {
            name: value
            for name, value in flat(config).items()
            if not name.startswith(("output_dir", "run."))
        },
    }
