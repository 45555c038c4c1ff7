"""What looks wrong is decoded again at higher temperatures (Radford et al. 2022, section 4.5)."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.recognizer import Recognizer, Window, batch_bucket, decode
from flax_distil.transcribe.options import SequentialOptions


def decode_with_fallback(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    options: DecodeOptions,
    windows: Sequence[Window],
    sequential: SequentialOptions,
    assistant: Assistant | None = None,
    heard_BSE: Float[Array, "B S E"] | None = None,
) -> list[Hypothesis]:
    """One hypothesis a window, each at the first temperature at which it looks right.

    The assistant drafts for greedy search alone.
    """
    found: dict[int, Hypothesis] = {}
    failed = list(range(len(windows)))
    for temperature in sequential.temperatures:
        again = [replace(windows[row], temperature=temperature) for row in failed]
        chosen_BSD, helper = audio_BSD, assistant if temperature == 0 else None
        if len(failed) < len(windows):
            rows = failed + failed[:1] * (batch_bucket(len(failed)) - len(failed))
            chosen_BSD, helper = audio_BSD[jnp.array(rows)], None
        hypotheses = decode(recognizer, chosen_BSD, options, again, helper, heard_BSE)
        found |= dict(zip(failed, hypotheses, strict=True))
        failed = [row for row in failed if looks_wrong(found[row], sequential)]
        if not failed:
            break
    return [found[row] for row in range(len(windows))]


def looks_wrong(found: Hypothesis, sequential: SequentialOptions) -> bool:
    """Whether a text repeats itself or the model doubts it, and it is not silence."""
    ratio, doubt = sequential.compression_ratio_threshold, sequential.logprob_threshold
    doubted = doubt is not None and found.mean_log_probability < doubt
    silent = sequential.no_speech_threshold is not None and (
        found.no_speech_probability > sequential.no_speech_threshold
    )
    if doubted:
        return not silent
    return ratio is not None and found.compression_ratio > ratio
