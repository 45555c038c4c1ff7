"""Cross-attention heads of a student that follow the speech: those that attend where its teacher's
alignment heads do. After training, the copied heads need not be the best ones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from flax_distil.decode.recognizer import Recognizer, encode_audio, pad_batch, recognize
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip
from flax_distil.transcribe.words import pad_texts, standardise, token_attention, upper_half

BEHIND = 0.05  # the best head's correlation


def heads_like(
    student: Recognizer,
    teacher: Recognizer,
    waveforms_BN: Num[np.ndarray, "B N"],
    seconds: Sequence[float],
    language: str | None = None,
) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the student's heads whose attention correlates with the teacher's the most.

    waveforms_BN: windows of speech as `recognize` takes them, two minutes or more in all. seconds:
    length of each without padding. The texts are the teacher's own. All heads that correlate
    nearly as well as the best one are kept.
    """
    tokens, spec, batch = teacher.tokens, teacher.spec, len(waveforms_BN)
    hypotheses = recognize(teacher, waveforms_BN, language=language)
    prompts = [tokens.prompt(one.language if tokens.multilingual else None) for one in hypotheses]
    frames = [round(100 * second) for second in seconds]
    padded_BN = pad_batch(waveforms_BN)
    texts = [one.tokens for one in hypotheses]
    inputs = pad_texts(tokens, spec, prompts, texts, len(padded_BN), frames)
    states = lambda one: encode_audio(one, padded_BN, drafting=False).model_BSD
    heads = teacher.alignment_heads or upper_half(spec)
    target_BLS, _ = token_attention(
        spec, teacher.params["decoder"], states(teacher), *inputs, heads
    )
    likeness_BNH = correlations(
        student.spec, student.params["decoder"], states(student), *inputs, target_BLS
    )
    mean_NH = np.asarray(likeness_BNH)[:batch].mean(0)
    places = np.argwhere(mean_NH >= mean_NH.max() - BEHIND)
    return tuple((int(layer), int(head)) for layer, head in places)


@by_clip(static=("spec",))
def correlations(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    audio_length_B: Int[Array, " B"],
    target_BLS: Float[Array, "B L S"],
) -> Float[Array, "B N H"]:
    """Pearson's correlation of each head's attention with the target.

    The other arguments are those of `token_attention`.
    """
    decoder = spec.decoder(params)

    def row(arguments: tuple[Array, ...]) -> Array:
        audio_SD, tokens_L, length, audio_length, target_LS = arguments
        _, scores = decoder.cross_scores(tokens_L[None], audio_SD[None])
        counts_LS = (jnp.arange(tokens_L.size) < length)[:, None] & (
            jnp.arange(len(audio_SD)) < audio_length
        )

        def centred(x_LS: Array) -> Array:
            return jnp.where(counts_LS, x_LS - x_LS.mean(where=counts_LS), 0)

        def likeness(attention_LS: Array) -> Array:
            ours, theirs = centred(attention_LS), centred(target_LS)
            return (ours * theirs).sum() / jnp.sqrt((ours**2).sum() * (theirs**2).sum() + 1e-12)

        layers = [standardise(layer[0], length, audio_length) for layer in scores]
        return jnp.stack([jax.vmap(likeness)(heads_HLS) for heads_HLS in layers])

    return jax.lax.map(row, (audio_BSD, tokens_BL, lengths_B, audio_length_B, target_BLS))
