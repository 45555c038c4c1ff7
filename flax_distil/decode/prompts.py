"""From options and windows to a search's arguments: prompts, rules and random seeds."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from flax_distil.decode.rules import RuleSet
from flax_distil.decode.search import Prompt, Sampling, Window
from flax_distil.errors import InputError
from flax_distil.options import DecodeOptions
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens

PROMPT_LENGTHS = (8, 64, 256)  # prompts are padded to one of these, so that few programs compile


def text_ids(tokens: WhisperTokens, text: str | None) -> tuple[int, ...]:
    """Token ids of a text, which Whisper begins with a space."""
    return tuple(tokens.encode(" " + text.strip())) if text and text.strip() else ()


def prompt_ids(
    tokens: WhisperTokens, context: int, options: DecodeOptions, window: Window
) -> list[int]:
    """The prompt of a window: hotwords, the end of the previous text, the task, the prefix.

    Hotwords and previous text take up less than half of the context (223 tokens); previous text is
    cut from the left, as in Whisper.

    context: the decoder's positions.

    Raises:
        InputError: hotwords or prefix are too long, or the model lacks the language or task.
    """
    prefix = prefix_ids(tokens, options)
    room = previous_room(tokens, context, options)
    previous = text_ids(tokens, options.hotwords) + (window.previous[-room:] if room else ())
    language = window.language if tokens.multilingual else None
    task = tokens.prompt(language, options.task, options.timestamps)
    if len(prefix) > (most := context // 2 - len(task)):
        raise InputError(f"the prefix has {len(prefix)} tokens: use at most {most}")
    return [*tokens.prompt(language, options.task, options.timestamps, previous), *prefix]


def prefix_ids(tokens: WhisperTokens, options: DecodeOptions) -> tuple[int, ...]:
    """The beginning of the text. With timestamps it starts at 0.00 s: a model that reads words
    without a timestamp closes them at once and ends the text."""
    prefix = text_ids(tokens, options.prefix)
    return (tokens.timestamp_begin, *prefix) if prefix and options.timestamps else prefix


def previous_room(tokens: WhisperTokens, context: int, options: DecodeOptions) -> int:
    """Tokens of previous text that fit: half of the context, less the hotwords.

    Raises:
        InputError: the hotwords are too long.
    """
    most = context // 2 - 1
    taken = len(text_ids(tokens, options.hotwords))
    if taken > most:
        raise InputError(f"the hotwords have {taken} tokens: use at most {most}")
    return most - taken


def make_prompt(prompts: Sequence[Sequence[int]], sot: int) -> Prompt:
    """Prompts of any lengths as one batch: short ones of equal length unpadded, others padded."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    sots = np.array([list(prompt).index(sot) for prompt in prompts], np.int32)
    width = longest = int(lengths.max())
    if longest <= PROMPT_LENGTHS[0] and (lengths == longest).all() and (sots == sots[0]).all():
        lengths, sots = lengths[0], sots[0]
    else:
        width = next((length for length in PROMPT_LENGTHS if longest <= length), longest)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Prompt(*map(jnp.asarray, (tokens, lengths, sots)))


def make_sampling(windows: Sequence[Window], rows: int) -> Sampling | None:
    """Temperatures and seeds of a batch of `rows`; None where nothing is drawn."""
    if not any(window.temperature > 0 for window in windows):
        return None
    temperature_B, seed_B = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    temperature_B[: len(windows)] = [window.temperature for window in windows]
    seed_B[: len(windows)] = [window.seed % 2**31 for window in windows]
    return Sampling(jnp.asarray(temperature_B), jnp.asarray(seed_B))


def rule_set(tokens: WhisperTokens, options: DecodeOptions) -> RuleSet:
    """The rules for a vocabulary and options."""
    return RuleSet(
        end=tokens.eot,
        no_speech=tokens.no_speech,
        suppressed=tokens.suppressed + tokens.padding,
        suppressed_first=tokens.suppressed_first,
        timestamp_begin=tokens.timestamp_begin if options.timestamps else None,
        no_timestamps=tokens.no_timestamps,
        max_initial=round(options.max_initial_timestamp / TIMESTAMP_STEP),
        prefixed=options.timestamps and bool(prefix_ids(tokens, options)),
        timestamp_end=tokens.times.stop if tokens.words else None,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram=options.no_repeat_ngram,
    )
