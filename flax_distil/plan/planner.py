"""Plans a recipe on a slice: compiles its programs and estimates each."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from flax_distil.cache import model_folder
from flax_distil.config import (
    DistillConfig,
    EvaluateConfig,
    InitStudentConfig,
    PlanConfig,
    PseudoLabelConfig,
)
from flax_distil.data.batches import bucket_for
from flax_distil.decode.recognizer import batch_bucket
from flax_distil.distill.check import with_defaults
from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import PUBLISHED, WhisperDims, dims_from_hf
from flax_distil.model.student import kept_layers
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import check_batch, data_shards, make_mesh
from flax_distil.plan.compiler import Compiled, Refusal, compiled
from flax_distil.plan.estimate import Estimate, TooLarge, largest_fitting
from flax_distil.plan.programs import Program, decode_programs, train_program
from flax_distil.plan.report import Plan
from flax_distil.plan.topology import Slice, devices, tpu_slice
from flax_distil.recipe import load_recipe, recipe_stages

log = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """Sizes of teacher and student."""

    teacher: WhisperDims
    student: WhisperDims


def plan(recipe: Path, topology: str, config: PlanConfig) -> Plan:
    """What every program of the recipe takes on one slice; see `flax_distil.plan.run`."""
    target = tpu_slice(topology)
    stages = recipe_stages(recipe)
    if "distill" not in stages:
        raise InputError(f"{recipe} has no table [distill]: a plan starts from it")
    distill = load_recipe(recipe, DistillConfig)
    sizes = sizes_of(recipe, distill)
    chips, compute = devices(target), distill.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor, chips)
    distill = with_defaults(distill, config.clips, data_shards(mesh), on_cpu=False)
    programs: list[Estimate | TooLarge] = []
    if "train" in config.programs:
        programs += train(config, distill, sizes, target, chips)
    for stage, table, kind, dims in (
        ("label", "pseudo-label", PseudoLabelConfig, sizes.teacher),
        ("evaluate", "evaluate", EvaluateConfig, sizes.student),
    ):
        if stage in config.programs and table in stages:
            programs += decode(stage, dims, load_recipe(recipe, kind), config, target, chips)
    if not programs:
        raise InputError(f"{recipe} has no table to plan {' or '.join(config.programs)} by")
    return Plan(recipe, target, distill.optimizer.steps, tuple(programs))


def train(
    config: PlanConfig, distill: DistillConfig, sizes: Sizes, target: Slice, chips: list[Any]
) -> list[Estimate | TooLarge]:
    """The train step at the longest label bucket, and at that of the usual label."""
    longest = usual = max(distill.label_buckets)
    if config.label_length is not None:
        usual = bucket_for(config.label_length, distill.label_buckets)
    if isinstance(config.batch, int):
        distill = replace(distill, batch_size=config.batch)
    compute = distill.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor, chips)
    if config.batch != "auto":  # the search may start from any number
        check_batch(distill.batch_size, mesh, compute.accumulation)
    parts = data_shards(mesh) * compute.accumulation
    rows = -(-distill.batch_size // parts)

    def step(rows: int, length: int) -> Program:
        asked = replace(distill, batch_size=rows * parts)
        return train_program(asked, sizes.teacher, sizes.student, chips, length)

    return [
        estimate(partial(step, length=length), rows, target, len(chips), sizes.teacher, config)
        for length in sorted({longest, usual}, reverse=True)
    ]


def decode(
    stage: str,
    dims: WhisperDims,
    recipe: PseudoLabelConfig | EvaluateConfig,
    config: PlanConfig,
    target: Slice,
    chips: list[Any],
) -> list[Estimate | TooLarge]:
    """Encoder and search of a stage that recognises speech, on the chips of one host.

    The recipe's batch size is that of one process.
    """
    timestamps = isinstance(recipe, PseudoLabelConfig) and recipe.timestamps
    options = DecodeOptions(timestamps=timestamps, max_tokens=recipe.max_tokens)
    # libtpu orders devices by hosts of four chips each.
    ours = sorted(chips, key=attrgetter("process_index"))[: target.host_chips]
    length = config.label_length or options.max_tokens

    def one(rows: int, index: int) -> Program:
        program = decode_programs(dims, recipe.dtype, rows, options, ours, length)[index]
        return replace(program, name=f"{stage}: {program.name}")

    rows = -(-batch_bucket(recipe.batch_size) // len(ours))
    return [
        estimate(partial(one, index=index), rows, target, len(ours), dims, config)
        for index in (0, 1)
    ]


def estimate(
    program: Callable[[int], Program],
    rows: int,
    target: Slice,
    chips: int,
    dims: WhisperDims,
    config: PlanConfig,
) -> Estimate | TooLarge:
    """What a program of `rows` clips per chip takes.

    With `config.batch` auto, also the largest number of clips that fits. Where `rows` do not fit,
    also a smaller number that does.
    """
    auto = config.batch == "auto"

    def ask(rows: int) -> tuple[Program, Compiled | Refusal]:
        asked = program(rows)
        sizes = (asked.name, target.name, rows, asked.length)
        log.info("%s on %s: %d clips a chip at a time, %d tokens", *sizes)
        return asked, compiled(asked, target, config.answers)

    def fits(rows: int) -> float | int:
        _, found = ask(rows)
        if isinstance(found, Refusal):
            return 0
        room = 0.95 * target.chip.memory - found.arguments  # the compiler keeps some for itself
        most = rows * room / max(found.temporaries, 1)
        return max(most // 8 * 8, rows)

    asked, answer = ask(rows)
    if isinstance(answer, Compiled):
        most = largest_fitting(fits, rows) if auto else None
        return Estimate(asked, answer, target, chips, dims.vocab, most)
    fitting, most = None, largest_fitting(fits, rows // 2, rows, exact=auto)
    if most:
        smaller, found = ask(most)
        assert isinstance(found, Compiled)
        fitting = Estimate(smaller, found, target, chips, dims.vocab)
    return TooLarge(asked, answer, chips, fitting)


def sizes_of(recipe: Path, distill: DistillConfig) -> Sizes:
    """Sizes of the recipe's models: the student's from its folder, else from [init-student].

    Raises:
        InputError: a model does not exist here and is not a published one.
    """
    teacher = known_dims(distill.teacher)
    if (Path(distill.student) / "config.json").is_file():
        return Sizes(teacher, known_dims(distill.student))
    if "init-student" not in recipe_stages(recipe):
        raise InputError(
            f"the student {distill.student} does not exist and {recipe} has no [init-student] "
            "with its layers: make one of the two"
        )
    layers = load_recipe(recipe, InitStudentConfig)
    return Sizes(teacher, kept_layers(teacher, layers.decoder_layers, layers.encoder_layers)[1])


def known_dims(name: str) -> WhisperDims:
    """Sizes of a published Whisper by its name, or of any folder by its config.json.

    Raises:
        InputError: neither.
    """
    published = name.removeprefix("openai/").removeprefix("whisper-")
    for folder in (Path(name), model_folder(name)):
        if (folder / "config.json").is_file():
            return dims_from_hf(read_json(folder / "config.json"))
    if published in PUBLISHED:
        return PUBLISHED[published]
    raise InputError(
        f"the sizes of {name} are not known: name a folder with its config.json, or one of "
        f"{', '.join(PUBLISHED)}"
    )
