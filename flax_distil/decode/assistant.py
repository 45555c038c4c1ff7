"""The assistant of a recogniser: a student, a smaller Whisper, or a look-up in the text."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_distil.decode.drafters import Assistant, LookupDrafter, model_drafter
from flax_distil.decode.recognizer import Recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.student import same_arrays
from flax_distil.parallel.clips import replicate

DRAFT_TOKENS = 4  # for each pass of the model, by default
CPU_VERIFYING = 0.16  # time of a further token in a pass, of that of a pass of one (docs/LOG.md)


def load_assistant(
    recognizer: Recognizer, name: str | Path, draft_tokens: int = DRAFT_TOKENS
) -> Assistant:
    """The assistant for a checkpoint's folder or name, or for "lookup".

    Raises:
        InputError: there is no such checkpoint, or it does not fit (`make_assistant`).
    """
    checkpoint = None if name == "lookup" else load_checkpoint(name)
    return make_assistant(recognizer, checkpoint, draft_tokens)


def make_assistant(
    recognizer: Recognizer, checkpoint: Checkpoint | None, draft_tokens: int = DRAFT_TOKENS
) -> Assistant:
    """A student or smaller Whisper as the assistant of `recognizer`; None looks up repetitions.

    A student whose encoder is the model's reads the same audio states.

    Its `break_even` is the time of a draft token where a pass of the model takes 1: the weights
    that it reads, of those that a pass reads, and on CPUs its verification.

    Raises:
        InputError: the two have different vocabularies or mel bins, or `draft_tokens` is 0.
    """
    if draft_tokens < 1:
        raise InputError(f"{draft_tokens} draft tokens a pass: an assistant needs at least 1")
    verifying = CPU_VERIFYING if jax.default_backend() == "cpu" else 0.0
    if checkpoint is None:
        return Assistant(LookupDrafter(), draft_tokens, verifying)
    ours, theirs = recognizer.spec.dims, checkpoint.dims
    if ours.vocab != theirs.vocab:
        raise InputError(
            f"the assistant has {theirs.vocab:,} tokens and the model {ours.vocab:,}: both need "
            "the same tokenizer, so English-only goes with English-only"
        )
    if ours.mels != theirs.mels:
        raise InputError(
            f"the assistant reads {theirs.mels} mel bins and the model {ours.mels}: both need the "
            "same"
        )
    spec = replace(recognizer.spec, dims=theirs)
    put = lambda half: replicate(jax.tree.map(lambda leaf: jnp.asarray(leaf, spec.dtype), half))
    drafter = model_drafter(spec, put(checkpoint.params["decoder"]))
    size = lambda half: sum(map(jnp.size, jax.tree.leaves((half["layers"], half["tokens"]))))
    reading = size(checkpoint.params["decoder"]) / size(recognizer.params["decoder"])
    encoder = put(checkpoint.params["encoder"])
    shared = same_arrays(encoder, recognizer.params["encoder"])
    own = None if shared else (spec, encoder)
    return Assistant(drafter, draft_tokens, reading + verifying, own)
