"""What the teacher says of a batch of clips: texts, and the states to distil without a teacher.

Final states are the decoder's output before the embedding makes logits of it, in float16: 11 bits
of each number, which the decoder's last layer norm keeps far below float16's largest.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float16, Int, Int16

from flax_distil.config import PseudoLabelConfig
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.recognizer import (
    Recognizer,
    decode,
    encode_audio,
    make_recognizer,
    pad_batch,
    prepare,
)
from flax_distil.decode.search import Hypothesis
from flax_distil.model.checkpoint import Checkpoint
from flax_distil.model.spec import Params, Spec
from flax_distil.options import DecodeOptions
from flax_distil.parallel.clips import by_clip

log = logging.getLogger(__name__)

LENGTHS = (32, 64, 128, 256, 448)  # texts are padded to one of these, so that few programs compile

# (waveforms int16 [B, 480000], language or None to detect it) → one hypothesis per row
Teacher = Callable[[Int16[np.ndarray, "B N"], str | None], Iterable[Hypothesis]]


@dataclass(frozen=True)
class Explained(Hypothesis):
    """A hypothesis with the teacher's states."""

    teacher_states: Float16[np.ndarray, "n D"] | None = None
    """Its decoder's final states at each token of prompt and label."""
    audio_SD: BFloat16[np.ndarray, "S D"] | None = None
    """Its encoder's states of the clip."""


def load_teacher(config: PseudoLabelConfig, checkpoint: Checkpoint) -> Teacher:
    """The function that transcribes batches with `checkpoint` as the configuration asks."""
    recognizer = make_recognizer(checkpoint, config.dtype)
    if config.assistant:
        if config.batch_size > 1 and jax.default_backend() == "cpu":
            log.warning("on a CPU the assistant works on batches of one only: use --batch-size 1")
        assistant = load_assistant(recognizer, config.assistant, config.draft_tokens)
        recognizer = replace(recognizer, assistant=assistant)
    options = DecodeOptions(
        task=config.task,
        timestamps=config.timestamps,
        max_tokens=config.max_tokens,
        beams=config.beams,
    )
    keep_states, keep_audio = config.teacher_states, config.audio_states is not None
    return partial(explain, recognizer, options, keep_states, keep_audio)


def explain(
    recognizer: Recognizer,
    options: DecodeOptions,
    keep_states: bool,
    keep_audio: bool,
    waveforms_BN: Int16[np.ndarray, "B N"],
    language: str | None,
) -> list[Explained]:
    """`recognize`, with the final states at every token and the audio states where asked for."""
    if not len(waveforms_BN):
        return []
    start = prepare(recognizer, options, len(waveforms_BN), language)
    encoded = encode_audio(recognizer, pad_batch(waveforms_BN))
    hypotheses = decode(recognizer, encoded, options, [start] * len(waveforms_BN))
    audio_BSD = encoded.model_BSD
    states: Sequence[np.ndarray | None] = [None] * len(hypotheses)
    if keep_states:
        states = label_states(recognizer, audio_BSD, hypotheses, options)
    kept = np.asarray(audio_BSD.astype(jnp.bfloat16)) if keep_audio else [None] * len(hypotheses)
    return [
        Explained(**vars(hypothesis), teacher_states=one, audio_SD=audio_SD)
        for hypothesis, one, audio_SD in zip(hypotheses, states, kept, strict=False)
    ]


def label_states(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    hypotheses: Sequence[Hypothesis],
    options: DecodeOptions,
) -> list[Float16[np.ndarray, "n D"]]:
    """The teacher's final states at each token of the prompt and of these hypotheses.

    The prompt and the text are read at once, as they were decoded and as training reads them; the
    states begin at the start of transcript. The first rows of `audio_BSD` are the hypotheses'.
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
    """The decoder's output, from which logits are computed. params: the decoder's."""
    return spec.decoder(params)(tokens_BL, audio_BSD).astype(jnp.float16)
