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
from flax_distil.distill.flops import (
    cross_flops,
    decoder_flops,
    encoder_flops,
    step_flops,
    vocabulary_flops,
)
from flax_distil.distill.setup import make_train_spec, read_of_teacher, stored_types, trainable_part
from flax_distil.distill.state import initial_state
from flax_distil.distill.step import Frozen
from flax_distil.distill.trainer import compile_step
from flax_distil.model.dims import CHUNK_SAMPLES, WhisperDims
from flax_distil.model.generation import generation_config, special_ids
from flax_distil.model.spec import Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.mesh import (
    batch_sharding,
    check_batch,
    make_mesh,
    replicated,
)
from flax_distil.parallel.overlap import overlap_options
from flax_distil.parallel.sharding import check_heads, shardings


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
    flops: float
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
    plan = make_train_spec(config, teacher, student, mesh)
    check_batch(config.batch_size, mesh, compute.accumulation)
    check_heads({"encoder": teacher.encoder_heads, "decoder": teacher.decoder_heads}, mesh)
    theirs, ours = plan.teacher.abstract(), plan.student.abstract()
    trainable = trainable_part(ours, config.train_encoder, scanned=False)  # laid out already
    own = {}
    if config.train_encoder:
        own = {"positions": ours["encoder"]["positions"]}
    elif teacher.encoder_layers != student.encoder_layers:
        own = in_kept_types(ours["encoder"], plan)
    frozen = Frozen(in_kept_types(read_of_teacher(theirs, plan), plan), own)
    start = partial(initial_state, config=config.optimizer, seed=config.seed)
    state = jax.eval_shape(start, trainable)
    placed = shardings(state, mesh, compute.fsdp_min_elements)
    state = at(state, placed)
    frozen = at(frozen, shardings(frozen, mesh, compute.fsdp_min_elements))
    batch = abstract_batch(config, teacher, length, batch_sharding(mesh))
    options = overlap_options(mesh) if compute.overlap else {}
    step = compile_step(plan, mesh, placed, options)
    rows = config.batch_size // plan.data_shards // compute.accumulation
    encode = config.audio_states is None
    return Program(
        name="train",
        clips=config.batch_size,
        rows=rows,
        length=length,
        flops=step_flops(plan, config.batch_size, length, bool(own), config.train_encoder, encode),
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
    params = at(jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), spec.abstract()),
                whole)  # fmt: skip
    shape: Any = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    number: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    waveforms = shape((batch, CHUNK_SAMPLES), jnp.int16)
    audio = shape((batch, dims.audio_positions, dims.width), jnp.dtype(dtype))
    prompt_length = 4 if dims.multilingual else 2
    prompt = Prompt(shape((batch, prompt_length), jnp.int32), number, number)
    room = min(options.max_tokens, dims.text_positions - prompt_length)
    steps = min(length, room)
    decoder = decoder_flops(dims, steps) + cross_flops(dims) + vocabulary_flops(dims, steps)
    return [
        Program(
            "encode", batch, rows, 0, batch * encoder_flops(dims),
            {"encoder": bytes_a_chip(params["encoder"]), "batch": bytes_a_chip(waveforms)},
            lower(encode, spec, params["encoder"], waveforms),
        ),
        Program(
            "decode", batch, rows, steps, batch * decoder,
            {"decoder": bytes_a_chip(params["decoder"]), "audio states": bytes_a_chip(audio)},
            lower(
                greedy, DecoderModel(spec, params["decoder"]),
                SearchInput(audio, prompt, shape((batch,), jnp.bool_)),
                rules=rule_set(dims, options), max_tokens=room,
            ),
            loops=steps,
        ),
    ]  # fmt: skip


def abstract_batch(
    config: DistillConfig,
    dims: WhisperDims,
    length: int,
    sharding: NamedSharding,
) -> Batch:
    """Shapes of the loader's batches; what is kept of encoder or teacher instead of running it."""
    rows = config.batch_size
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    tokens, audio = shape((rows, length), jnp.int32), None
    samples = CHUNK_SAMPLES
    if config.audio_states is not None:
        samples = 0
        states = (rows, dims.audio_positions, dims.width)
        audio: Any = shape(states, jnp.dtype(config.compute.dtype))
    fields: dict[str, Any] = {
        "waveforms": shape((rows, samples), jnp.int16),
        "tokens": tokens,
        "targets": tokens,
        "weights": shape((rows, length), jnp.float32),
        "seconds": shape((rows,), jnp.float32),
        "rows": shape((rows,), jnp.int32),
        "audio": audio,
    }
    if config.stored_teacher:
        fields["teacher_states"] = shape((rows, length, dims.width), jnp.float16)
    if uses_spec_augment(config.augment):
        fields["keys"] = shape((rows, 2), jnp.uint32)
    return Batch(**fields)


def rule_set(dims: WhisperDims, options: DecodeOptions) -> RuleSet:
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


def in_kept_types(tree: Any, plan: Any) -> Any:
    """Shapes of frozen parameters in the types that they are kept in."""
    return jax.tree.map(
        lambda leaf, dtype: leaf.update(dtype=dtype), tree, stored_types(tree, plan)
    )


def at(tree: Any, places: Any) -> Any:
    """Shapes with the shardings of `places`, one for all or a tree of them."""
    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda leaf: leaf.update(sharding=places), tree)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), tree, places)


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
