"""Plans a recipe on a slice: its programs as the stages compile them, over shapes alone, and their
estimates."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from flax_distil.cache import model_folder
from flax_distil.config import (
    DistillConfig,
    EvaluateConfig,
    InitStudentConfig,
    PlanConfig,
    PseudoLabelConfig,
)
from flax_distil.data.augment import uses_spec_augment
from flax_distil.data.batches import Batch, bucket_for
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import batch_bucket, encode
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import DecoderModel, Prompt, SearchInput
from flax_distil.distill import flops, setup
from flax_distil.distill.check import with_defaults
from flax_distil.errors import InputError, read_json
from flax_distil.model.dims import CHUNK_SAMPLES, PUBLISHED, WhisperDims, dims_from_hf
from flax_distil.model.generation import generation_config, special_ids
from flax_distil.model.spec import Spec
from flax_distil.model.student import kept_layers
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import (
    batch_sharding,
    check_batch,
    data_shards,
    make_mesh,
    overlap_options,
    replicated,
)
from flax_distil.plan.compiler import Compiled, Program, Refusal, compiled
from flax_distil.plan.report import Estimate, Plan, TooLarge
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


def largest_fitting(
    fits: Callable[[int], float | int], first: int, refused: int | None = None, exact: bool = True
) -> int | None:
    """The largest number that fits, to an eighth; None where not even 1 does.

    fits: asks the compiler, which takes minutes to say yes and seconds to say no: 0 where the
    number does not fit, else how many would by what these take. refused: a number that is known
    not to fit. exact: else any half, quarter, … of `first`.
    """
    low, high, ask = 0, refused, first
    while ask:
        expected = fits(ask)
        if expected:
            low = ask
        else:
            high = ask
        eighth = max(low // 8, 1)
        if high is None:
            ask = max(int(expected), low + eighth)
        elif not low:
            ask = high // 2
        elif exact and high - low > eighth:
            ask = (low + high) // 2
        else:
            break
    return low or None


# --- programs -----------------------------------------------------------------------------------


def train_program(
    config: DistillConfig,
    teacher: WhisperDims,
    student: WhisperDims,
    devices: list[Any],
    length: int,
) -> Program:
    """The trainer's step on batches whose labels have `length` tokens.

    Raises:
        InputError: recipe, models and number of chips do not fit.
    """
    compute = config.compute
    mesh = make_mesh(compute.data, compute.fsdp, compute.tensor, devices)
    own_encoder = teacher.encoder_layers != student.encoder_layers
    spec = setup.make_train_spec(config, teacher, student, mesh, own_encoder)
    models = spec.teacher.abstract(), spec.student.abstract()
    trainable, frozen = jax.eval_shape(partial(setup.split_parameters, spec), *models)
    state, frozen = setup.place_shapes(trainable, frozen, config, mesh)
    batch = abstract_batch(config, teacher, length, batch_sharding(mesh))
    options = overlap_options(mesh) if compute.overlap else {}
    step = setup.compile_step(spec, mesh, state, options)
    rows = config.batch_size // spec.data_shards // compute.accumulation
    return Program(
        name="train",
        clips=config.batch_size,
        rows=rows,
        length=length,
        flops=flops.step_flops(spec, config.batch_size, length, encode=config.audio_states is None),
        arguments={
            "teacher": bytes_a_chip(frozen.teacher),
            "student": bytes_a_chip((state.params, frozen.student_encoder)),
            "moments": bytes_a_chip(state.optimizer),
            "batch": bytes_a_chip(batch),
        },
        lowered=lower(step, state, frozen, batch),
        loops=-(-rows * length // (compute.vocabulary_chunk or rows * length)),
        options=options,
    )


def decode_programs(
    dims: WhisperDims,
    dtype: str,
    rows: int,
    options: DecodeOptions,
    devices: list[Any],
    length: int,
) -> list[Program]:
    """What recognition runs: the encoder, then greedy search from the prompt to the last token.

    rows: clips of a chip, of those of one process. length: tokens of a text, for the work that is
    expected; memory is that of `options.max_tokens`.
    """
    mesh = make_mesh(devices=devices)
    batch, spec, whole = rows * len(devices), Spec(dims, dtype).on(devices[0]), replicated(mesh)
    params = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.dtype(dtype), sharding=whole), spec.abstract()
    )
    shape: Any = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    waveforms = shape((batch, CHUNK_SAMPLES), jnp.int16)
    audio = shape((batch, dims.audio_positions, dims.width), jnp.dtype(dtype))
    prompt_length = 4 if dims.multilingual else 2
    prompt = Prompt(shape((batch, prompt_length), jnp.int32), number, number)
    room = min(options.max_tokens, dims.text_positions - prompt_length)
    steps = min(length, room)
    decoder = (
        flops.decoder_flops(dims, steps)
        + flops.cross_flops(dims)
        + flops.vocabulary_flops(dims, steps)
    )
    return [
        Program(
            "encode", batch, rows, 0, batch * flops.encoder_flops(dims),
            {"encoder": bytes_a_chip(params["encoder"]), "batch": bytes_a_chip(waveforms)},
            lower(encode, spec, params["encoder"], waveforms),
        ),
        Program(
            "decode", batch, rows, steps, batch * decoder,
            {"decoder": bytes_a_chip(params["decoder"]), "audio states": bytes_a_chip(audio)},
            lower(
                greedy, DecoderModel(spec, params["decoder"]),
                SearchInput(audio, prompt, shape((batch,), jnp.bool_)),
                rules=published_rules(dims, options), max_tokens=room,
            ),
            loops=steps,
        ),
    ]  # fmt: skip


def abstract_batch(
    config: DistillConfig, dims: WhisperDims, length: int, sharding: NamedSharding
) -> Batch:
    """Shapes of the loader's batches; what is kept of encoder or teacher instead of running it."""

    def array(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((config.batch_size, *sizes), dtype, sharding=sharding)

    tokens, encoded = array(jnp.int32, length), config.audio_states is not None
    states = array(jnp.dtype(config.compute.dtype), dims.audio_positions, dims.width)
    return Batch(
        waveforms=array(jnp.int16, 0 if encoded else CHUNK_SAMPLES),
        tokens=tokens,
        targets=tokens,
        weights=array(jnp.float32, length),
        seconds=array(jnp.float32),
        rows=array(jnp.int32),
        audio=states if encoded else None,
        teacher_states=array(jnp.float16, length, dims.width) if config.stored_teacher else None,
        keys=array(jnp.uint32, 2) if uses_spec_augment(config.augment) else None,
    )


def published_rules(dims: WhisperDims, options: DecodeOptions) -> RuleSet:
    """The rules of a published checkpoint with this vocabulary."""
    ids, config = special_ids(dims), generation_config(dims)
    begin = ids["notimestamps"] + 1
    return RuleSet(
        end=ids["endoftext"],
        no_speech=ids["nospeech"],
        suppressed=tuple(config["suppress_tokens"]),
        suppressed_first=tuple(config["begin_suppress_tokens"]),
        timestamp_begin=begin if options.timestamps else None,
        no_timestamps=ids["notimestamps"],
    )


def bytes_a_chip(tree: Any) -> float:
    """Bytes of the part of these arrays that each chip holds."""
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )


def lower(function: Any, *arguments: Any, **static: Any) -> Any:
    """A jitted function for these shapes on a TPU."""
    return function.trace(*arguments, **static).lower(lowering_platforms=("tpu",))
