"""Whether labels fit the run that learns them: their task, their vocabulary, who made them."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flax_distil.config import DistillConfig
from flax_distil.data.mixing import TrainingSource
from flax_distil.data.utterances import Concatenated, Utterances
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.pseudo_label.identity import fingerprint
from flax_distil.pseudo_label.store import SETTINGS, read_settings
from flax_distil.text.tokens import WhisperTokens

log = logging.getLogger(__name__)


def label_stores(config: DistillConfig) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Each label store whose labels are learnt, the task they are learnt as, what made them."""
    named = [(path, "transcribe") for path in config.labels]
    named += [(Path(one.source), one.task) for one in config.data if one.target != "text"]
    for path, task in named:
        if (path / SETTINGS).is_file():
            yield path, task, read_settings(path)


def check_tasks(config: DistillConfig) -> None:
    """Raises InputError where labels were written for another task than prompts would name."""
    for path, task, settings in label_stores(config):
        if settings["task"] != task:
            raise InputError(
                f"{path} was labelled to {settings['task']} and would be taught to {task}: name it "
                f'in a [[distill.data]] table that says task = "{settings["task"]}"'
            )


def check_vocabulary(config: DistillConfig, tokens: WhisperTokens) -> None:
    """Raises InputError where a label store's token ids are of another vocabulary: the same
    numbers would be other words and other times."""
    for path, _, settings in label_stores(config):
        theirs, model = settings.get("vocabulary"), settings.get("model", "another model")
        if theirs is not None and theirs != tokens.vocabulary:
            raise InputError(
                f"{path} holds token ids of {model}, whose vocabulary has {theirs:,} tokens, and "
                f"the student {config.student} has {tokens.vocabulary:,}: label with a teacher of "
                "the student's vocabulary"
            )


def check_ids(sources: Sequence[TrainingSource], tokens: WhisperTokens) -> None:
    """Raises InputError where labels that do not say their vocabulary have ids that the student's
    lacks, or its `<|notimestamps|>`, which no label holds: another vocabulary's first time."""
    for utterances in parts(sources):
        if not isinstance(utterances, Utterances) or not utterances.columns.labelled:
            continue
        source = Path(utterances.config.source)
        if (source / SETTINGS).is_file() and "vocabulary" in read_settings(source):
            continue
        ids = set(chain.from_iterable(row or () for row in utterances.column("token_ids")))
        unknown = [id for id in ids if not 0 <= id < tokens.vocabulary]
        if unknown:
            raise InputError(
                f"{source} has the token id {max(unknown)}, and the student's vocabulary has "
                f"{tokens.vocabulary:,} tokens: label with a teacher of that vocabulary"
            )
        if tokens.no_timestamps in ids:
            raise InputError(
                f"{source} has the token id {tokens.no_timestamps} in labels, "
                "which is <|notimestamps|> in the student's vocabulary of "
                f"{tokens.vocabulary:,} tokens: its times are of another vocabulary. Label with a "
                "teacher of the student's"
            )


def warn_of_teacher(config: DistillConfig, teacher: Checkpoint) -> None:
    """Say so, once, where labels were written by another model than the teacher."""
    weights = fingerprint(teacher.params)
    others = [
        f"{path} by {settings['model']} ({settings['weights']})"
        for path, _, settings in label_stores(config)
        if settings.get("weights", weights) != weights
    ]
    if others:
        log.warning(
            "labels were written by another model than the teacher %s (%s), to whose distributions "
            "the KL divergence draws the student: %s",
            *(config.teacher, weights, ", ".join(others)),
        )


def warn_of_prompts(config: DistillConfig, sources: Sequence[TrainingSource]) -> None:
    """Say so, once, where no dataset tells which utterance was spoken before another."""
    if config.prompt_probability and not any(map(knows_previous, sources)):
        log.warning(
            "prompt_probability is %g, and no dataset names the speaker or recording of "
            "consecutive utterances: none is trained with the text before it. Name "
            "speaker_column or recording_column, or set prompt_probability to 0",
            config.prompt_probability,
        )


def knows_previous(source: TrainingSource) -> bool:
    """Whether some utterance of a source may be read with the text before it."""
    if source.size is not None:
        return source.own_prompts or bool(source.follows.any())
    columns = source.utterances.columns  # type: ignore[union-attr]
    return (columns.speaker, columns.recording) != (None, None)


def taught(config: DistillConfig, sources: Sequence[TrainingSource], tokens: WhisperTokens) -> dict:
    """What an exported student has to say of its training: languages, tasks, and whether some
    examples were read with the text before them."""
    previous = bool(config.prompt_probability) and any(map(knows_previous, sources))
    return spoken(sources, tokens) | {"previous_text": previous}


def spoken(sources: Sequence[TrainingSource], tokens: WhisperTokens) -> dict[str, Any]:
    """Languages and tasks that are learnt, sorted; languages are None where not all are known."""
    languages, tasks = set(), set()
    for source in sources:
        if not source.speech:
            continue
        tasks.add(source.options.task)
        default = source.options.language or (None if tokens.multilingual else "en")
        for utterances in parts([source]):
            columns, named = utterances.columns, utterances.config.language or default
            if columns.language is None:
                languages.add(named)
            elif isinstance(utterances, Utterances):
                languages.update(one or named for one in set(utterances.column(columns.language)))
            else:  # a stream's rows are not read yet
                languages.add(None)
    known = None not in languages
    codes = {one for one in languages if one and not tokens.unsupported(one)}
    return {"languages": sorted(codes) if known else None, "tasks": sorted(tasks)}


def parts(sources: Sequence[TrainingSource]) -> Iterator[Any]:
    """The datasets that sources are made of, windows opened."""
    for source in sources:
        found = source.utterances
        for one in found.parts if isinstance(found, Concatenated) else (found,):
            yield getattr(one, "utterances", one)
