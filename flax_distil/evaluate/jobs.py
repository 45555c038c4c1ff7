"""What is evaluated and how, checked before models are loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flax_distil.config import EvaluateConfig, EvaluationDataConfig
from flax_distil.data.utterances import Utterances, UtteranceStream, read_dataset
from flax_distil.data.windows import identity_digest
from flax_distil.distill.tracking import METRICS
from flax_distil.errors import InputError
from flax_distil.evaluate.conditions import Condition, PreviousText, noise_conditions
from flax_distil.evaluate.models import FlaxModel, Model
from flax_distil.options import ChunkedOptions, SequentialOptions
from flax_distil.pseudo_label.jobs import fingerprint
from flax_distil.text.languages import to_language_code
from flax_distil.transcription.recordings import LongForm

# What `full` stands for, where an option has its default.
FULL = {
    "noise": (40.0, 30.0, 20.0, 15.0, 10.0, 5.0, 0.0, -5.0, -10.0),
    "prompts": (50, 100, 200),
    "non_speech": 60,
    "latency": (1, 4, 16),
    "chunk_lengths": (30.0, 25.0, 20.0, 15.0, 10.0),
}
# Smallest value → options.
LEAST = {
    1: ("batch_size", "passes", "max_tokens", "max_clips", "join"),
    0: ("non_speech", "resamples", "worst"),
}
# Options that do not change the results of a part of the evaluation.
IRRELEVANT = ("output_dir", "overwrite", "resamples", "worst", "run", "strict", "latency", "full")
IRRELEVANT += ("noise", "noise_kinds", "prompts", "methods", "chunk_lengths")


@dataclass(frozen=True)
class EvaluationSet:
    """A dataset under its name in the report."""

    name: str
    config: EvaluationDataConfig
    utterances: Utterances | UtteranceStream


@dataclass(frozen=True)
class EvaluationJob:
    """What is evaluated and how."""

    config: EvaluateConfig
    sources: Mapping[str, tuple[str, str | None]]
    """Name in the report → model and its assistant."""
    sets: Sequence[EvaluationSet]
    conditions: Sequence[Condition]
    """Under which clips with speech are decoded."""
    methods: Mapping[str, LongForm]
    """How recordings are transcribed, by the name in the report."""

    def key(self, models: Mapping[str, Model]) -> dict[str, object]:
        """What determines the results: options, weights and datasets as they are now."""
        options = dataclasses.asdict(self.config)
        weights = {
            name: fingerprint(model.recognizer.params)
            if isinstance(model, FlaxModel)
            else files(Path(model.source))
            for name, model in models.items()
        }
        streamed = {one.name: None for one in self.sets}
        return {
            "options": {name: one for name, one in options.items() if name not in IRRELEVANT},
            "weights": weights,
            "datasets": streamed
            | {
                one.name: identity_digest(one.utterances)
                for one in self.sets
                if isinstance(one.utterances, Utterances)
            },
        }


def prepare(config: EvaluateConfig) -> EvaluationJob:
    """The job that a configuration describes.

    Raises:
        InputError: an option is out of range, two names are equal, or a dataset cannot be read.
    """
    if config.full:
        default = {one.name: one.default for one in dataclasses.fields(config)}
        missing = {
            name: one for name, one in FULL.items() if getattr(config, name) == default[name]
        }
        config = replace(config, **missing)
    if config.language:
        config = replace(config, language=to_language_code(config.language))
    for least, names in LEAST.items():
        for name in names:
            value = getattr(config, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: use {least} or more")
    if config.run and not (config.run / METRICS).is_file():
        raise InputError(f"{config.run} has no {METRICS}: name the folder of a training run")
    for name in ("latency", "prompts"):
        if min(getattr(config, name), default=1) < 1:
            raise InputError(f"{name} are {getattr(config, name)}: use 1 or more")
    methods: dict[str, LongForm] = {}
    if "sequential" in config.methods:
        methods["sequential"] = SequentialOptions()
    if "chunked" in config.methods:
        methods |= {f"chunked, {n:g} s": ChunkedOptions(n) for n in config.chunk_lengths}
    sources, sets = model_names(config), open_sets(config)
    noise = noise_conditions(config.noise, config.noise_kinds, config.noise_recordings)
    prompts = [Condition("prompt", f"{n} tokens", PreviousText(n)) for n in config.prompts]
    return EvaluationJob(config, sources, sets, [Condition("short"), *noise, *prompts], methods)


def model_names(config: EvaluateConfig) -> dict[str, tuple[str, str | None]]:
    """Name in the report → model and its assistant. Raises InputError where names are equal."""
    if not config.models or not (config.datasets or config.data or config.non_speech):
        raise InputError("name at least one model (--models) and one dataset (--datasets)")
    if config.names and len(config.names) != len(config.models):
        raise InputError(f"{len(config.names)} names for {len(config.models)} models")
    names = config.names or tuple(Path(source).name for source in config.models)
    if len(set(names)) < len(names):
        raise InputError(f"several models have the same name ({', '.join(names)}): add --names")
    models: dict[str, tuple[str, str | None]] = {
        name: (source, None) for name, source in zip(names, config.models, strict=True)
    }
    if config.assistant is not None:
        helper = next((n for n, (s, _) in models.items() if s == config.assistant), None)
        name = f"{names[0]} with {helper or Path(config.assistant).name}"
        models[name] = (config.models[0], config.assistant)
    return models


def open_sets(config: EvaluateConfig) -> list[EvaluationSet]:
    """The datasets, with names that differ.

    Raises:
        InputError: a dataset cannot be read or has no references, or two names are equal.
    """
    shared = {name: getattr(config, name) for name in ("config", "split", "text_column")}
    asked = [EvaluationDataConfig(source, **shared) for source in config.datasets]
    asked += config.data
    named = dict(zip(set_names(asked), asked, strict=False))
    if len(named) < len(asked):
        raise InputError("two datasets have the same name: give each a name in the recipe")
    sets = []
    for name, data in named.items():
        data = replace(
            data, limit=config.max_clips or data.limit, language=config.language or data.language
        )
        utterances = read_dataset(data)
        if data.speech and utterances.columns.text is None:
            raise InputError(
                f"{data.source} has no reference text: name its column as --text-column"
            )
        sets.append(EvaluationSet(name, data, utterances))
    return sets


def set_names(asked: Sequence[EvaluationDataConfig]) -> list[str]:
    """Names of datasets: those given, else the last part of the path, the configuration and split;
    the last two parts where names would be equal."""
    names: list[str] = []
    for parts in (1, 2):
        names = []
        for one in asked:
            path = Path(one.source)
            last = "/".join((*path.parts[:-1], path.name)[-parts:])
            for suffix in (".jsonl", ".parquet"):
                last = last.removesuffix(suffix)
            names.append(one.name or " ".join(filter(None, (last, one.config, one.split))))
        if len(set(names)) == len(names):
            break
    return names


def files(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the files of another library's model."""
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    about = [(path.name, path.stat()) for path in paths if path.is_file()]
    return [(name, one.st_size, one.st_mtime_ns) for name, one in about]
