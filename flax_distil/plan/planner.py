"""A recipe on a slice: its programs, and the compiler's answer for each."""

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
from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import PUBLISHED, WhisperDims, dims_from_hf
from flax_distil.model.student import choose_layers
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import check_batch, data_shards, make_mesh
from flax_distil.plan.compiler import Compiled, compiled
from flax_distil.plan.estimate import (
    Estimate,
    TooLarge,
    estimate,
    largest_fitting,
)
from flax_distil.plan.programs import Program, decode_programs, train_program
from flax_distil.plan.report import Plan
from flax_distil.plan.topology import Slice, devices, tpu_slice
from flax_distil.recipe import load_recipe, recipe_stages

log = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """Teacher and student of a recipe, known by their sizes alone."""

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
    chips = devices(target)
    programs: list[Estimate | TooLarge] = []
    if "train" in config.programs:
        programs += train(config, distill, sizes, target, chips)
    if "label" in config.programs and "pseudo-label" in stages:
        label = load_recipe(recipe, PseudoLabelConfig)
        options = DecodeOptions(timestamps=label.timestamps, max_tokens=label.max_tokens)
        programs += decode(
            "label", sizes.teacher, label.dtype, label.batch_size, options, config, target, chips
        )
    if "evaluate" in config.programs and "evaluate" in stages:
        judge = load_recipe(recipe, EvaluateConfig)
        options = DecodeOptions(max_tokens=judge.max_tokens)
        programs += decode(
            "evaluate", sizes.student, judge.dtype, judge.batch_size, options, config, target, chips
        )
    if not programs:
        raise InputError(f"{recipe} has no table to plan {' or '.join(config.programs)} by")
    return Plan(recipe, target, distill.optimizer.steps, tuple(programs))


def train(
    config: PlanConfig,
    distill: DistillConfig,
    sizes: Sizes,
    target: Slice,
    chips: list[Any],
) -> list[Estimate | TooLarge]:
    """The train step at the longest label bucket, and at that of the usual label."""
    longest = usual = max(distill.label_buckets)
    if config.label_length is not None:
        usual = bucket_for(config.label_length, distill.label_buckets)
    if isinstance(config.batch, int):
        distill = replace(distill, batch_size=config.batch)
    compute = distill.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor, chips)
    if config.batch != "auto":  # which needs a number to begin with, of which any is as good
        check_batch(distill.batch_size, mesh, compute.accumulation)
    parts = data_shards(mesh) * compute.accumulation
    rows = -(-distill.batch_size // parts)

    def step(rows: int, length: int) -> Program:
        asked = replace(distill, batch_size=rows * parts)
        return train_program(asked, sizes.teacher, sizes.student, chips, length)

    return [
        judged(partial(step, length=length), rows, target, len(chips), sizes.teacher, config)
        for length in sorted({longest, usual}, reverse=True)
    ]


def decode(
    stage: str,
    dims: WhisperDims,
    dtype: str,
    batch: int,
    options: DecodeOptions,
    config: PlanConfig,
    target: Slice,
    chips: list[Any],
) -> list[Estimate | TooLarge]:
    """Encoder and search of a stage that recognises speech, on the chips of one host.

    batch: clips of a process. Each host of a slice has others.
    """
    # libtpu takes every host for one of four chips: its devices are in order of these.
    ours = sorted(chips, key=attrgetter("process_index"))[: target.host_chips]
    length = config.label_length or options.max_tokens

    def one(rows: int, index: int) -> Program:
        program = decode_programs(dims, dtype, rows, options, ours, length)[index]
        return replace(program, name=f"{stage}: {program.name}")

    rows = -(-batch_bucket(batch) // len(ours))
    return [
        judged(partial(one, index=index), rows, target, len(ours), dims, config) for index in (0, 1)
    ]


def judged(
    program: Callable[[int], Program],
    rows: int,
    target: Slice,
    chips: int,
    dims: WhisperDims,
    config: PlanConfig,
) -> Estimate | TooLarge:
    """The compiler's answer to a program of `rows` clips a chip, worked out.

    With `config.batch` auto, also the most that a chip holds. Where `rows` are too many, less that
    it holds.
    """
    asked, auto = program(rows), config.batch == "auto"
    log.info(
        "%s on %s: %d clips, %d tokens",
        *(asked.name, target.name, asked.clips, asked.length),
    )
    answer = compiled(asked, target, config.answers)

    def fits(rows: int) -> float | int:
        log.info("does %s fit with %d clips a chip at a time?", asked.name, rows)
        found = compiled(program(rows), target, config.answers)
        if not isinstance(found, Compiled):
            return 0
        room = 0.95 * target.chip.memory - found.arguments  # the compiler keeps some for itself
        most = rows * room / max(found.temporaries, 1)
        return max(most // 8 * 8, rows)

    if isinstance(answer, Compiled):
        found = estimate(asked, answer, target, chips, dims.vocab)
        return replace(found, largest_batch=largest_fitting(fits, rows)) if auto else found
    most = largest_fitting(fits, rows // 2, rows, exact=auto)
    fitting = None
    if most:
        smaller = program(most)
        answer_there = compiled(smaller, target, config.answers)
        assert isinstance(answer_there, Compiled)
        fitting = estimate(smaller, answer_there, target, chips, dims.vocab)
    return TooLarge(
        asked.name,
        asked.clips,
        rows,
        asked.length,
        chips,
        *(answer.needed, answer.available),
        asked.arguments,
        fitting,
        answer.source or "refused now",
    )


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
    kept = choose_layers(layers.decoder_layers, teacher.decoder_layers, "decoder")
    student = replace(teacher, decoder_layers=len(kept))
    if layers.encoder_layers is not None:
        kept = choose_layers(layers.encoder_layers, teacher.encoder_layers, "encoder")
        student = replace(student, encoder_layers=len(kept))
    return Sizes(teacher, student)


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
