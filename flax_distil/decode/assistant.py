"""Who drafts for a recogniser: a student or smaller Whisper, or the text itself."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_distil.decode.drafters import Assistant, LookupDrafter, frequent_ids, model_drafter
from flax_distil.decode.recognizer import Recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint, load_checkpoint
from flax_distil.model.spec import Spec
from flax_distil.model.student import same_arrays
from flax_distil.parallel.clips import spread

GUESSES = 4  # a pass, where nobody says how many
CPU_VOCABULARY = 24_000  # of 100 tokens of English text some 94 are among them (docs/LOG.md)


def load_assistant(recognizer: Recognizer, name: str | Path, guesses: int = GUESSES) -> Assistant:
    """The assistant that `name` stands for: a checkpoint's folder or name, or "lookup".

    On CPUs it guesses from the first 24,000 text tokens: its projection takes half the time.

    Raises:
        InputError: there is no such checkpoint, or it does not fit (`make_assistant`).
    """
    vocabulary = CPU_VOCABULARY if jax.default_backend() == "cpu" else None
    checkpoint = None if name == "lookup" else load_checkpoint(name)
    return make_assistant(recognizer, checkpoint, guesses, vocabulary)


def make_assistant(
    recognizer: Recognizer,
    checkpoint: Checkpoint | None,
    guesses: int = GUESSES,
    vocabulary: int | None = None,
    texts: Iterable[Sequence[int]] = (),
) -> Assistant:
    """A student or smaller Whisper as the assistant of `recognizer`; None looks up repetitions.

    A student with the teacher's encoder hears through it, once for both. vocabulary: how many text
    tokens it may guess, ranked by their frequency in `texts` (ids of transcripts).

    Raises:
        InputError: the two have different vocabularies or mel bins, or `guesses` is less than 1.
    """
    if guesses < 1:
        raise InputError(f"{guesses} guesses a pass: an assistant makes at least 1")
    if checkpoint is None:
        return Assistant(LookupDrafter(), guesses)
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
    spec = Spec(checkpoint.dims, recognizer.spec.dtype)
    put = lambda half: spread(jax.tree.map(lambda leaf: jnp.asarray(leaf, spec.dtype), half))
    ids = None
    if vocabulary is not None:
        ids = spread(jnp.asarray(frequent_ids(recognizer.tokens, vocabulary, texts)))
    drafter = model_drafter(spec, put(checkpoint.params["decoder"]), ids)
    encoder = put(checkpoint.params["encoder"])
    if same_arrays(encoder, recognizer.params["encoder"]):
        return Assistant(drafter, guesses)
    return Assistant(drafter, guesses, (spec, encoder))
