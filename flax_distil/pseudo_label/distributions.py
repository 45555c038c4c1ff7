"""The teacher's final states at each token of prompt and label, to distil without a teacher.

Final states are the decoder's output before the embedding makes logits of it, in float16: 11 bits
of each number, which the decoder's last layer norm keeps far below float16's largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float16, Int, Int16

from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.recognizer import (
    Recognizer,
    Window,
    decode,
    detect,
    drafter_hears,
    encode,
    pad_batch,
    prepare,
)
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip


@dataclass(frozen=True)
class Explained(Hypothesis):
    """A hypothesis, and what its teacher knew when it wrote it."""

    teacher_states: Float16[np.ndarray, "n D"] | None = None
    """Its decoder's final states at each token of prompt and label."""
    audio_SD: BFloat16[np.ndarray, "S D"] | None = None
    """What its encoder said of the clip."""


LENGTHS = (32, 64, 128, 256, 448)  # texts are padded to one of these, so that few programs compile


def explain(
    recognizer: Recognizer,
    waveforms_BN: Int16[np.ndarray, "B N"],
    options: DecodeOptions,
    keep_states: bool = False,
    keep_audio: bool = False,
    assistant: Assistant | None = None,
) -> list[Explained]:
    """`recognize`, with the final states at every token and the audio states where asked for."""
    known, _ = prepare(recognizer, options, len(waveforms_BN), assistant)
    filled_BN = pad_batch(waveforms_BN)
    audio_BSD = encode(recognizer.spec, recognizer.params["encoder"], filled_BN)
    languages = [known] * len(waveforms_BN) if known else detect(recognizer, audio_BSD)
    windows = [Window(language) for language in languages[: len(waveforms_BN)]]
    heard_BSE = drafter_hears(assistant, windows, encode, filled_BN)
    found = decode(recognizer, audio_BSD, options, windows, assistant, heard_BSE)
    states: Sequence[np.ndarray | None] = [None] * len(found)
    if keep_states:
        states = label_states(recognizer, audio_BSD, found, options)
    kept = np.asarray(audio_BSD.astype(jnp.bfloat16)) if keep_audio else [None] * len(found)
    return [
        Explained(**vars(hypothesis), teacher_states=one, audio_SD=audio_SD)
        for hypothesis, one, audio_SD in zip(found, states, kept, strict=False)
    ]


def label_states(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    hypotheses: Sequence[Hypothesis],
    options: DecodeOptions,
) -> list[Float16[np.ndarray, "n D"]]:
    """The teacher's final states at each token of the prompt and of these hypotheses.

    The whole text is read at once, behind the prompt that it was written behind and that training
    puts before it; the prompt's states are kept too, from the start of transcript on. The
    rows of `audio_BSD` are the hypotheses' clips.
    """
    tokens = recognizer.tokens
    lines = []
    for hypothesis in hypotheses:
        language = hypothesis.language if tokens.multilingual else None
        prompt = tokens.prompt(language, options.task, options.timestamps)
        lines.append([*prompt, *hypothesis.tokens])
    longest = max(map(len, lines))
    length = next(length for length in LENGTHS if length >= longest)
    tokens_BL = np.full((len(audio_BSD), length), tokens.eot, np.int32)
    for row, line in zip(tokens_BL, lines, strict=False):
        row[: len(line)] = line
    params = recognizer.params["decoder"]
    states_BLD = np.asarray(final_states(recognizer.spec, params, audio_BSD, tokens_BL))
    return [states_LD[: len(line)] for states_LD, line in zip(states_BLD, lines, strict=False)]


@by_clip(static=("spec",))
def final_states(
    spec: Spec, params: Params, audio_BSD: Float[Array, "B S D"], tokens_BL: Int[Array, "B L"]
) -> Float16[Array, "B L D"]:
    """What logits are made of. params: the decoder's."""
    return spec.decoder(params)(tokens_BL, audio_BSD).astype(jnp.float16)
