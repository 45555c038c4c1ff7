"""The teacher's distribution at each token of prompt and label, for distilling without a teacher.

Final states are the decoder's output before the embedding makes logits of it, in float16: 11 bits
of each number, which the decoder's last layer norm keeps far from float16's largest.

Of the likeliest tokens, K are kept with their log-probabilities, and of all others log Σ p^(1/T)
for each temperature T that may be trained at. At T = 1 this is the tail's mass. At any other T it
does not follow from that mass (it depends on how the tail divides it), so it is computed while the
whole distribution is there, and training at a temperature that is not stored is refused.

Log-probabilities are float16: 11 bits change each by at most |log p| / 2048, and so the divergence
by at most 1/2048 of the teacher's entropy. Tokens are uint16, tails float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float16, Int, Int16

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.stored_teacher import StoredForm, StoredTeacher
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
from flax_distil.errors import InputError
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip


@dataclass(frozen=True)
class Explained(Hypothesis):
    """A hypothesis, and what its teacher knew when it wrote it."""

    distributions: StoredTeacher | None = None
    """What else it would have written, token by token."""
    audio_SD: BFloat16[np.ndarray, "S D"] | None = None
    """What its encoder said of the clip."""


LENGTHS = (32, 64, 128, 256, 448)  # texts are padded to one of these, so that few programs compile


def check_form(config: PseudoLabelConfig, vocabulary: int) -> None:
    """Raises InputError for two forms at once, and numbers of tokens or temperatures that cannot
    be stored."""
    if config.teacher_states and config.top_k:
        raise InputError(
            f"teacher_states and top_k {config.top_k}: the first holds all that the second does"
        )
    if not 0 <= config.top_k < vocabulary:
        raise InputError(f"top_k {config.top_k} of {vocabulary} tokens: 0 stores none, 32 is usual")
    temperatures = config.top_k_temperatures
    if config.top_k and (not temperatures or min(temperatures) <= 0):
        raise InputError(f"top_k_temperatures {temperatures}: name at least one, all above 0")


def explain(
    recognizer: Recognizer,
    waveforms_BN: Int16[np.ndarray, "B N"],
    options: DecodeOptions,
    form: StoredForm | None = None,
    keep_audio: bool = False,
    assistant: Assistant | None = None,
) -> list[Explained]:
    """`recognize`, and with a form the distributions at every token of what was written."""
    known, _ = prepare(recognizer, options, len(waveforms_BN), assistant)
    filled_BN = pad_batch(waveforms_BN)
    audio_BSD = encode(recognizer.spec, recognizer.params["encoder"], filled_BN)
    languages = [known] * len(waveforms_BN) if known else detect(recognizer, audio_BSD)
    windows = [Window(language) for language in languages[: len(waveforms_BN)]]
    heard_BSE = drafter_hears(assistant, windows, encode, filled_BN)
    found = decode(recognizer, audio_BSD, options, windows, assistant, heard_BSE)
    stored: Sequence[StoredTeacher | None] = [None] * len(found)
    if form:
        stored = distributions(recognizer, audio_BSD, found, options, form)
    kept = np.asarray(audio_BSD.astype(jnp.bfloat16)) if keep_audio else [None] * len(found)
    return [
        Explained(**vars(hypothesis), distributions=one, audio_SD=audio_SD)
        for hypothesis, one, audio_SD in zip(found, stored, kept, strict=False)
    ]


def distributions(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    hypotheses: Sequence[Hypothesis],
    options: DecodeOptions,
    form: StoredForm,
) -> list[StoredTeacher]:
    """The teacher at each token of the prompt and of these hypotheses.

    The whole text is read at once, behind the prompt that it was written behind and that training
    puts before it; the prompt's distributions are kept too, from the start of transcript on. The
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
    spec, params = recognizer.spec, recognizer.params["decoder"]
    if form.width:
        found = (final_states(spec, params, audio_BSD, tokens_BL),)
    else:
        found = top_k(spec, params, audio_BSD, tokens_BL, form.top_k, form.temperatures)
    found = jax.device_get(found)
    return [form.make([leaf[row, : len(line)] for leaf in found]) for row, line in enumerate(lines)]


@by_clip(static=("spec",))
def final_states(
    spec: Spec, params: Params, audio_BSD: Float[Array, "B S D"], tokens_BL: Int[Array, "B L"]
) -> Float16[Array, "B L D"]:
    """What logits are made of. params: the decoder's."""
    return spec.decoder(params)(tokens_BL, audio_BSD).astype(jnp.float16)


@by_clip(static=("spec", "k", "temperatures"))
def top_k(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    tokens_BL: Int[Array, "B L"],
    k: int,
    temperatures: tuple[float, ...],
) -> tuple[Array, Array, Array]:
    """The K likeliest next tokens [B L K], their log-probabilities, and the tails [B L T].

    params: the decoder's. The logits of one clip exist at a time.
    """
    decoder = spec.decoder(params)

    def row(hidden_LD: Array) -> tuple[Array, Array, Array]:
        log_p_LV = jax.nn.log_softmax(decoder.logits(hidden_LD[None])[0])
        top_LK, tokens_LK = jax.lax.top_k(log_p_LV, k)
        rest_LV = jnp.put_along_axis(log_p_LV, tokens_LK, -jnp.inf, axis=-1, inplace=False)
        tails = [jax.nn.logsumexp(rest_LV / temperature, axis=-1) for temperature in temperatures]
        return tokens_LK.astype(jnp.uint16), top_LK.astype(jnp.float16), jnp.stack(tails, axis=-1)

    return jax.lax.map(row, decoder(tokens_BL, audio_BSD))
