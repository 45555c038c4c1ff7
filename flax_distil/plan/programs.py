"""The programs of a recipe as the stages compile them, over shapes alone: nothing is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from flax_distil.config import DistillConfig
from flax_distil.data.augment import uses_spec_augment
from flax_distil.data.batches import Batch
from flax_distil.decode.greedy import greedy
from flax_distil.decode.recognizer import encode
from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import DecoderModel, Prompt, SearchInput
from flax_distil.distill import flops, setup
from flax_distil.model.dims import CHUNK_SAMPLES, WhisperDims
from flax_distil.model.generation import generation_config, special_ids
from flax_distil.model.spec import Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import batch_sharding, make_mesh, overlap_options, replicated


@dataclass(frozen=True)
class Program:
    """One program, lowered and not yet compiled.

    name: train, encode or decode. clips: of one run, over all chips. rows: clips that a chip
    computes at a time. length: tokens of a clip. flops: useful ones of one run, over all chips.
    arguments: bytes a chip of each group. options: the compiler's, which `lowered` holds.
    loops: rounds of the loop whose end depends on the data, over the tokens of a text or, where
    every label is as long as it may be, over the vocabulary's chunks.
    """

    name: str
    clips: int
    rows: int
    length: int
    flops: float | int
    arguments: dict[str, float]
    lowered: Any
    loops: int = 1
    options: Mapping[str, str | bool] = field(default_factory=dict)


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
