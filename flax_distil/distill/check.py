"""Everything that must hold before a training run begins: nothing is checked later.

`check_config` needs the configuration alone, `check` the models as well, and opens the datasets;
`check_fit` needs the sizes of the models and a mesh, and is the planner's too.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from flax_distil.config import DistillConfig, OptimizerConfig
from flax_distil.data.augment import uses_spec_augment
from flax_distil.data.mixing import TrainingSource, audio_hours, training_sources
from flax_distil.data.utterances import Concatenated, Utterances
from flax_distil.distill.checkpoints import has_checkpoints
from flax_distil.errors import InputError, check_writable
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.dims import WhisperDims
from flax_distil.model.generation import context_positions
from flax_distil.model.student import same_arrays
from flax_distil.parallel.mesh import check_batch, check_heads, data_shards, make_mesh
from flax_distil.pseudo_label.jobs import fingerprint
from flax_distil.pseudo_label.store import SETTINGS, read_settings
from flax_distil.text.languages import to_language_code
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)

# What numbers of the configuration must be, how that is tested, and which these are.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "1 or more": (
        lambda value: value >= 1,
        "lanes max_skipped compute.accumulation compute.fsdp compute.tensor "
        "run.save_every run.keep run.log_every run.workers "
        "validation.every validation.batch_size validation.max_tokens",
    ),
    "1 or more, or -1": (
        lambda value: value >= 1 or value == -1,
        "batch_size optimizer.steps",
    ),
    "between 0 and 1": (
        lambda value: 0 <= value <= 1,
        "timestamp_probability prompt_probability max_skipped_share",
    ),
    "at least 0 and below 1": (lambda value: 0 <= value < 1, "dropout loss.label_smoothing"),
    "positive": (
        lambda value: value > 0,
        "loss.temperature optimizer.epochs optimizer.learning_rate optimizer.max_gradient_norm",
    ),
}

# The paper's run (table 15; its 80,000 updates are eight epochs), and the longest published
# student's epochs, distil-large-v3.5's.
STEPS, BATCH, WARMUP, EPOCHS, MOST_EPOCHS = 80_000, 256, 500, 8.0, 80
SMALL_BATCH = 4


def check_config(config: DistillConfig) -> None:
    """Raises InputError for a configuration that cannot be trained by, whatever the models are."""
    check_numbers(config)
    asks_teacher = not config.stored_teacher and (config.loss.kl or config.loss.mse)
    if config.audio_context and config.audio_states and asks_teacher:
        raise InputError(
            "audio_states of an audio_context are for the student alone, and the teacher needs "
            "those of 30 s: add stored_teacher, or leave out audio_states"
        )
    check_folder(config)
    if config.run.wandb and not find_spec("wandb"):
        raise InputError(
            f"--run.wandb {config.run.wandb} needs wandb, which is not installed: pip install "
            "flax-distil[wandb]"
        )


def check(
    config: DistillConfig, teacher: Checkpoint, student: Checkpoint
) -> tuple[DistillConfig, tuple[TrainingSource, ...]]:
    """The configuration `with_defaults`, and the opened datasets; logs what the run will be.

    Logs a warning where labels are another teacher's, no clip has a text before it, or the run has
    more epochs than any published one.

    Raises:
        InputError: a dataset cannot be read, labels are of another task, vocabulary or teacher than
            they have to be, audio states cannot be used, a stream is to last for epochs, or the
            mesh does not fit the devices.
    """
    tokens = student.tokens()
    check_labels(config, teacher, tokens)
    sources = training_sources(config, tokens)
    check_audio_states(config, teacher, student, sources)
    check_ids(sources, tokens)
    warn_of_prompts(config, sources)
    compute, sizes = config.compute, [source.size for source in sources]
    clips = None if None in sizes else sum(size or 0 for size in sizes)
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    config = with_defaults(config, clips, data_shards(mesh), on_cpu)
    check_warmup(config.optimizer)
    hours = None if clips is None else sum(audio_hours(source.utterances) for source in sources)
    log_length(config, clips, hours)
    return config, sources


def log_length(config: DistillConfig, clips: int | None, hours: float | None) -> None:
    """Logs what the run will be, and a warning for more epochs than any published run had."""
    steps, batch = config.optimizer.steps, config.batch_size
    if clips is None:
        log.info("%d updates of %d clips from streams", steps, batch)
        return
    epochs, change = steps * batch / clips, "--optimizer.epochs, --optimizer.steps or --batch-size"
    log.info(
        "%d clips, %.2f hours of audio; %d updates of %d clips, %.3g epochs (change with %s)",
        *(clips, hours, steps, batch, epochs, change),
    )
    if epochs > MOST_EPOCHS:
        log.warning(
            "the run has %.0f epochs of %d clips, and published students have %g to %d: set "
            "--optimizer.epochs, or add data",
            *(epochs, clips, EPOCHS, MOST_EPOCHS),
        )


def check_fit(
    config: DistillConfig, teacher: WhisperDims, student: WhisperDims, mesh: Mesh
) -> None:
    """Raises InputError unless both models fit each other, and they and the batch fit the mesh."""
    for name in ("vocab", "width", "mels", "audio_positions", "text_positions"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise InputError(
                f"the teacher has {name} {theirs} and the student {ours}: make the student of "
                "this teacher with init-student"
            )
    check_batch(config.batch_size, mesh, config.compute.accumulation)
    check_heads({"encoder": teacher.encoder_heads, "decoder": teacher.decoder_heads}, mesh)


def check_numbers(config: DistillConfig) -> None:
    """Raises InputError for numbers that nothing could be trained with."""
    loss, buckets = config.loss, config.label_buckets
    if config.language is not None:
        to_language_code(config.language)
    if min(loss.kl, loss.ce, loss.mse) < 0 or loss.kl + loss.ce + loss.mse == 0:
        raise InputError(
            f"loss weights kl {loss.kl}, ce {loss.ce}, mse {loss.mse}: none may be negative and "
            "one must be positive"
        )
    if loss.kl_end is not None and (loss.kl_end < 0 or not loss.kl):
        raise InputError(
            f"loss.kl goes from {loss.kl} to kl_end {loss.kl_end}: the first must be positive and "
            "the second not negative"
        )
    context_positions(config.audio_context)  # may raise
    if not buckets or not all(1 <= one <= 448 for one in buckets):
        raise InputError(f"label_buckets {buckets}: name lengths from 1 to 448 tokens")
    if -1 not in (config.optimizer.steps, config.optimizer.warmup_steps):
        check_warmup(config.optimizer)
    for kind, (holds, names) in NUMBERS.items():
        for name in names.split():
            value = attrgetter(name)(config)
            if value is not None and not holds(value):
                raise InputError(f"{name.rpartition('.')[2]} {value:g} must be {kind}")


def check_warmup(optimizer: OptimizerConfig) -> None:
    """Raises InputError if the warm-up is longer than the run."""
    warmup = 0 if optimizer.schedule == "constant" else optimizer.warmup_steps
    if optimizer.steps < 1 or not 0 <= warmup <= optimizer.steps:
        raise InputError(
            f"{optimizer.warmup_steps} warm-up steps do not fit into {optimizer.steps} steps: "
            "choose fewer"
        )


def check_folder(config: DistillConfig) -> None:
    """Raises InputError if the folder cannot be written to, or `run.resume` contradicts it."""
    check_writable(config.output_dir)
    exists = has_checkpoints(config.output_dir)
    if exists and config.run.resume == "no":
        raise InputError(
            f"{config.output_dir} has checkpoints of a run: continue it with --run.resume must, or "
            "choose another --output-dir"
        )
    if not exists and config.run.resume == "must":
        raise InputError(
            f"{config.output_dir} has no checkpoint to resume from: is it the right folder?"
        )


def label_stores(config: DistillConfig) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Each label store to train on, the task that prompts will name, and the store's settings."""
    named = [(path, "transcribe") for path in config.labels]
    named += [(Path(one.source), one.task) for one in config.data if one.target != "text"]
    for path, task in named:
        if (path / SETTINGS).is_file():
            yield path, task, read_settings(path)


def check_labels(config: DistillConfig, teacher: Checkpoint, tokens: WhisperTokens) -> None:
    """Raises InputError if label stores do not fit the task, the student's vocabulary or, where its
    states are stored, the teacher. Logs one warning for all labels of another model than it.

    A stored state belongs to one prompt and one sequence of tokens. Whatever changes the tokens
    before a place (timestamps dropped, a previous text as prompt, packed clips, another task) would
    compare the student with a teacher that was given other tokens.
    """
    if config.stored_teacher and config.loss.mse:
        raise InputError("stored_teacher has no hidden states of layers to match: set --loss.mse 0")
    if config.stored_teacher and (config.data or not config.labels):
        raise InputError(
            "stored_teacher needs label stores as pseudo-label writes them: name them with "
            "--labels, and leave out --data"
        )
    weights, others = fingerprint(teacher.params), []
    for path, task, settings in label_stores(config):
        vocabulary = settings.get("vocabulary", tokens.vocabulary)
        by = f"{settings.get('model', 'another model')} ({settings.get('weights')})"
        if settings["task"] != task:
            raise InputError(
                f"{path} was labelled to {settings['task']} and would be taught to {task}: name it "
                f'in a [[distill.data]] table that says task = "{settings["task"]}"'
            )
        if vocabulary != tokens.vocabulary:
            raise InputError(
                f"{path} holds token ids of {by}, whose vocabulary has {vocabulary:,} tokens, and "
                f"the student {config.student} has {tokens.vocabulary:,}: label with a teacher of "
                "the student's vocabulary"
            )
        if config.stored_teacher:
            check_states(path, settings, by, weights, config)
        elif settings.get("weights", weights) != weights:
            others.append(f"{path} by {by}")
    if others:
        log.warning(
            "labels were written by another model than the teacher %s (%s), whose distributions "
            "the KL divergence compares with: %s",
            *(config.teacher, weights, ", ".join(others)),
        )


def check_states(
    path: Path, settings: dict[str, Any], by: str, weights: str, config: DistillConfig
) -> None:
    """Raises InputError if a store has no states, or those of another teacher or prompt."""
    if not settings.get("teacher_states"):
        raise InputError(
            f"{path} has no final states of its teacher: label with --teacher-states, or leave out "
            "stored_teacher"
        )
    if settings["weights"] != weights:
        raise InputError(
            f"{path} was written by {by} and the teacher is {config.teacher} ({weights}): name "
            "that teacher"
        )
    if settings["timestamps"] and config.timestamp_probability != 1:
        raise InputError(
            f"{path} was written with timestamps, and timestamp_probability "
            f"{config.timestamp_probability} would drop some: set it to 1, or label without"
        )


def check_ids(sources: Sequence[TrainingSource], tokens: WhisperTokens) -> None:
    """Raises InputError if labels have ids that the student's vocabulary lacks.

    So is its `<|notimestamps|>`, which no label holds: it is another vocabulary's first timestamp.
    Only labels whose vocabulary is not recorded are searched.
    """
    for utterances in datasets_of(sources):
        if not isinstance(utterances, Utterances) or not utterances.columns.labelled:
            continue
        source = Path(utterances.config.source)
        if (source / SETTINGS).is_file() and "vocabulary" in read_settings(source):
            continue
        ids = set(chain.from_iterable(row or () for row in utterances.column("token_ids")))
        wrong = [
            one for one in ids if one == tokens.no_timestamps or not 0 <= one < tokens.vocabulary
        ]
        if wrong:
            raise InputError(
                f"{source} has the token id {max(wrong)} in labels, which the student's vocabulary "
                f"of {tokens.vocabulary:,} tokens lacks or has for <|notimestamps|>: label with a "
                "teacher of that vocabulary"
            )


def check_audio_states(
    config: DistillConfig,
    teacher: Checkpoint,
    student: Checkpoint,
    sources: Sequence[TrainingSource],
) -> None:
    """Raises InputError if the encoder's output differs by model, or from pass to pass."""
    if config.audio_states is None:
        return
    encoders = (one.params["encoder"] for one in (teacher, student))
    if config.train_encoder or not same_arrays(*encoders):
        raise InputError(
            "audio_states hold the output of the teacher's frozen encoder, and this student has an "
            "encoder of its own: leave audio_states out"
        )
    changing = config.augment.noise or uses_spec_augment(config.augment)
    if changing or any(source.size is None for source in sources):
        raise InputError(
            "audio_states hold one output for each clip of a dataset: leave them out with streams, "
            "noise or SpecAugment"
        )


def warn_of_prompts(config: DistillConfig, sources: Sequence[TrainingSource]) -> None:
    """Logs a warning if no dataset says which utterance was spoken before another."""
    if config.prompt_probability and not any(map(knows_previous, sources)):
        log.warning(
            "prompt_probability is %g, and no dataset names the speaker or recording of "
            "consecutive utterances: none is trained with the text before it. Name "
            "speaker_column or recording_column, or set prompt_probability to 0",
            config.prompt_probability,
        )


def knows_previous(source: TrainingSource) -> bool:
    """Whether some utterance of a source may have the text before it as prompt."""
    if source.size is not None:
        return source.own_prompts or bool(source.follows.any())
    columns = source.utterances.columns  # type: ignore[union-attr]
    return (columns.speaker, columns.recording) != (None, None)


def with_defaults(
    config: DistillConfig, clips: int | None, shards: int, on_cpu: bool
) -> DistillConfig:
    """The configuration with the batch, updates and warm-up that data and machine decide.

    clips: of all datasets; None if unknown, as of streams. shards: parts that a batch is cut into.

    Raises InputError for epochs of an unknown number of clips.
    """
    optimizer, batch, steps = config.optimizer, config.batch_size, config.optimizer.steps
    if batch == -1:
        hundredth = BATCH if clips is None else 1 << (clips // 100).bit_length() >> 1
        batch = SMALL_BATCH if on_cpu else min(max(hundredth, SMALL_BATCH), BATCH)
        parts = shards * config.compute.accumulation
        batch = -(-batch // parts) * parts
    if optimizer.epochs is not None and clips is None:
        raise InputError(
            f"epochs is {optimizer.epochs:g} and the number of clips is not known, as of streams: "
            "give --optimizer.steps instead, or to plan, --clips"
        )
    if clips is None:
        steps = STEPS if steps == -1 else steps
    elif optimizer.epochs is not None or steps == -1:
        passes = optimizer.epochs or EPOCHS
        steps = math.ceil(round(passes * clips, 6) / batch)
        steps = min(steps, STEPS) if optimizer.epochs is None else steps
    warmup = optimizer.warmup_steps
    if warmup == -1:
        warmup = min(WARMUP, steps // 10)
    optimizer = replace(optimizer, steps=steps, warmup_steps=warmup)
    return replace(config, batch_size=batch, optimizer=optimizer)


def datasets_of(sources: Sequence[TrainingSource]) -> Iterator[Any]:
    """The datasets that sources are made of, windows opened."""
    for source in sources:
        found = source.utterances
        for one in found.parts if isinstance(found, Concatenated) else (found,):
            yield getattr(one, "utterances", one)
