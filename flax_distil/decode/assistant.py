"""Who drafts for a recogniser: a student or smaller Whisper, or the text itself."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flax_distil.decode.drafters import Assistant, LookupDrafter, frequent_ids, model_drafter
from flax_distil.decode.recognizer import Recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.student import same_arrays
from flax_distil.parallel.clips import replicate

DRAFT_TOKENS = 4  # a pass, where nobody says how many
CPU_READING = 0.16  # what one token more takes there, where a pass of one takes 1 (docs/LOG.md)
CPU_VOCABULARY = 24_000  # of 100 tokens of English text some 94 are among them (docs/LOG.md)


def load_assistant(
    recognizer: Recognizer, name: str | Path, draft_tokens: int = DRAFT_TOKENS
) -> Assistant:
    """The assistant that `name` stands for: a checkpoint's folder or name, or "lookup".

    On CPUs it guesses from the first 24,000 text tokens: its projection takes half the time.

    Raises:
        InputError: there is no such checkpoint, or it does not fit (`make_assistant`).
    """
    vocabulary = CPU_VOCABULARY if jax.default_backend() == "cpu" else None
    checkpoint = None if name == "lookup" else load_checkpoint(name)
    return make_assistant(recognizer, checkpoint, draft_tokens, vocabulary)


def make_assistant(
    recognizer: Recognizer,
    checkpoint: Checkpoint | None,
    draft_tokens: int = DRAFT_TOKENS,
    vocabulary: int | None = None,
    texts: Iterable[Sequence[int]] = (),
    break_even: float | None = None,
) -> Assistant:
    """A student or smaller Whisper as the assistant of `recognizer`; None looks up repetitions.

    A student with the teacher's encoder hears through it, once for both. vocabulary: how many text
    tokens it may guess, ranked by their frequency in `texts` (ids of transcripts). break_even: the
    part of its guesses that must be accepted (`speculative`). By default, what a guess costs of a
    pass: the weights it reads, of those that a pass reads, and on CPUs its own verification.

    Raises:
        InputError: the two have different vocabularies or mel bins, or `draft_tokens` is 0.
    """
    if draft_tokens < 1:
        raise InputError(f"{draft_tokens} draft tokens a pass: an assistant makes at least 1")
    reading = CPU_READING if jax.default_backend() == "cpu" else 0.0
    if checkpoint is None:
        return Assistant(
            LookupDrafter(), draft_tokens, reading if break_even is None else break_even
        )
    ours, theirs = recognizer.spec.dims, checkpoint.dims
    if ours.vocab != theirs.vocab:
        raise InputError(
            f"the assistant has {theirs.vocab:,} tokens and the model {ours.vocab:,}: both need "
            "the same tokenizer, so English-only goes with English-only"
        )
    if ours.mels != theirs.mels:
        raise InputError(
            f"the assistant hears {theirs.mels} mel bins and the model {ours.mels}: both need the "
            "same"
        )
    spec = replace(recognizer.spec, dims=checkpoint.dims)
    put = lambda half: replicate(jax.tree.map(lambda leaf: jnp.asarray(leaf, spec.dtype), half))
    ids = None
    if vocabulary is not None:
        ids = replicate(jnp.asarray(frequent_ids(recognizer.tokens, vocabulary, texts)))
    drafter = model_drafter(spec, put(checkpoint.params["decoder"]), ids)
    if break_even is None:
        whole = recognizer.params["decoder"]
        weights = _size(whole["layers"]) + _size(whole["tokens"])
        break_even = (_size(drafter.params["layers"]) + drafter.head_DU.size) / weights + reading
    encoder = put(checkpoint.params["encoder"])
    shared = same_arrays(encoder, recognizer.params["encoder"])
    return Assistant(drafter, draft_tokens, break_even, None if shared else (spec, encoder))


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
