"""Recognition with an assistant that drafts: the teacher's texts, sooner."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from flax_distil.decode.drafters import Drafter, LookupDrafter, ModelDrafter, frequent_ids
from flax_distil.decode.greedy import Sampling
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.recognizer import (
    Recognizer,
    Window,
    checked_language,
    detect,
    fill,
    listen,
    make_prompt,
    prompt_ids,
    read,
    rule_set,
    text_ids,
)
from flax_distil.decode.speculative import Tally, speculative
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Params, Spec
from flax_distil.model.student import same_arrays


@dataclass(frozen=True, eq=False)
class Assistant:
    """A drafter, how many tokens it guesses at a time, and its encoder where it has its own."""

    drafter: Drafter
    guesses: int
    encoder: tuple[Spec, Params] | None = None


def make_assistant(
    recognizer: Recognizer,
    checkpoint: Checkpoint | None,
    guesses: int = 4,
    vocabulary: int | None = None,
    texts: Iterable[Sequence[int]] = (),
) -> Assistant:
    """A student or smaller Whisper as the assistant of `recognizer`; None looks up repetitions.

    A student with the teacher's encoder hears through it, once for both. vocabulary: how many text
    tokens it may guess, ranked by their frequency in `texts` (ids of transcripts).

    Raises:
        InputError: the two have different vocabularies, or `guesses` is less than 1.
    """
    if guesses < 1:
        raise InputError(f"{guesses} guesses a pass: an assistant makes at least 1")
    if checkpoint is None:
        return Assistant(LookupDrafter(), guesses)
    ours, theirs = recognizer.spec.dims.vocab, checkpoint.dims.vocab
    if ours != theirs:
        raise InputError(
            f"the assistant has {theirs:,} tokens and the model {ours:,}: both need the same "
            "tokenizer, so English-only goes with English-only"
        )
    spec = Spec(checkpoint.dims, recognizer.spec.dtype)
    put = lambda half: jax.tree.map(lambda leaf: jnp.asarray(leaf, spec.dtype), half)
    ids = None
    if vocabulary is not None:
        ids = jnp.asarray(frequent_ids(recognizer.tokens, vocabulary, texts))
    drafter = ModelDrafter(spec, put(checkpoint.params["decoder"]), ids)
    encoder = put(checkpoint.params["encoder"])
    if same_arrays(encoder, recognizer.params["encoder"]):
        return Assistant(drafter, guesses)
    return Assistant(drafter, guesses, (spec, encoder))


def recognize_assisted(
    recognizer: Recognizer,
    assistant: Assistant,
    waveforms_BN: Num[np.ndarray, "B N"],
    options: DecodeOptions,
) -> tuple[list[Hypothesis], Tally]:
    """What `recognize` returns for greedy search, or a draw at `options.temperature`, and how good
    the guesses were. waveforms_BN: windows of 30 s.

    Raises:
        InputError: beams or `best_of` are asked for, or the model lacks the language or task.
    """
    if (options.beams, options.best_of) != (1, 1):
        raise InputError(
            f"an assistant cannot help {options.beams} beams and the best of {options.best_of}: "
            "use one of each"
        )
    spec, params, tokens = recognizer.spec, recognizer.params, recognizer.tokens
    batch, waveforms_BN = len(waveforms_BN), fill(waveforms_BN)
    known = checked_language(recognizer, options)
    audio_BSD = listen(spec, params["encoder"], waveforms_BN)
    heard_BSD = listen(*assistant.encoder, waveforms_BN) if assistant.encoder else audio_BSD
    languages = [known] * len(waveforms_BN) if known else detect(recognizer, audio_BSD)
    previous = text_ids(tokens, options.prompt)
    windows = [
        Window(language, previous, options.temperature, options.seed + row)
        for row, language in enumerate(languages)
    ]
    prompts = [prompt_ids(recognizer, options, window) for window in windows]
    rows = jnp.arange(len(windows), dtype=jnp.int32)
    found, tally = speculative(
        spec,
        params["decoder"],
        audio_BSD,
        make_prompt(prompts, tokens.sot),
        rows < batch,
        rule_set(tokens, options),
        min(options.max_tokens, spec.dims.text_positions - min(map(len, prompts))),
        assistant.drafter,
        heard_BSD,
        assistant.guesses,
        Sampling(jnp.full(rows.shape, options.temperature), options.seed + rows)
        if options.temperature
        else None,
    )
    found, tally = jax.device_get((found, tally))
    return read(found, windows[:batch], tokens), tally
