"""Which audio each token belongs to: the cross-attention of the heads that follow the speech, as in
openai-whisper, and the choice of these heads for a student.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from flax_distil.decode.recognizer import Recognizer, encode_audio, pad_batch, recognize
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.model.generation import upper_half
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip

FILTER = 7  # width of the median filter, in audio positions
LENGTHS = (32, 64, 128, 256)  # texts are padded to one of these, so that few programs compile
BEHIND = 0.05  # how far a head's correlation with the teacher may lie below the best head's


class AlignmentInput(NamedTuple):
    """A batch of windows and their texts.

    audio_BSD: audio states. tokens_BL: prompt, text and end of text, padded on the right.
    length_B, audio_length_B: tokens and audio positions without padding.
    """

    audio_BSD: Float[Array, "B S D"]
    tokens_BL: Int[Array | np.ndarray, "B L"]
    length_B: Int[Array | np.ndarray, " B"]
    audio_length_B: Int[Array | np.ndarray, " B"]


def alignment_input(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    frames: Sequence[int] | None = None,
) -> AlignmentInput:
    """The texts of the first windows, padded.

    frames: those of 10 ms that are audio and not padding, a window; all by default.
    """
    eot, dims, batch = recognizer.tokens.eot, recognizer.spec.dims, len(audio_BSD)
    rows = [[*prompt, *text, eot] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows), default=0)
    width = next((length for length in LENGTHS if longest <= length), dims.text_positions)
    padded = np.full((batch, width), eot, np.int32)
    lengths = np.full(batch, len(prompts[0]) + 1 if prompts else 1, np.int32)
    audio_lengths = np.full(batch, dims.audio_positions, np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)], lengths[index] = row, len(row)
    if frames is not None:
        audio_lengths[: len(rows)] = np.minimum(frames, CHUNK_FRAMES) // 2
    return AlignmentInput(audio_BSD, padded, lengths, audio_lengths)


def heads_of(recognizer: Recognizer) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the alignment heads; all of the later half of the layers where they are not
    known."""
    upper = ((layer, head) for layer, head in upper_half(recognizer.spec.dims))
    return recognizer.alignment_heads or tuple(upper)


@by_clip(static=("spec", "heads", "words"))
def token_attention(
    spec: Spec,
    params: Params,
    batch: AlignmentInput,
    heads: tuple[tuple[int, int], ...],
    words: tuple[int, ...] = (),
) -> tuple[Float[Array, "B L S"], Float[Array, "B L"]]:
    """The attention of each token to each audio position, and the next token's probability.

    params: the decoder's. heads: (layer, head) of those that follow the speech. words: ids of text
    after the timestamps.
    """
    decoder = spec.decoder(params)

    def row(one: tuple[Array, ...]) -> tuple[Array, Array]:
        audio_SD, tokens_L, length, audio_length = one
        hidden_1LD, scores = decoder.cross_scores(tokens_L[None], audio_SD[None])
        scores_HLS = jnp.stack([scores[layer][0, head] for layer, head in heads])
        smooth_LS = standardise(scores_HLS, length, audio_length).mean(0)
        # As a distribution over text alone, without timestamps and the like.
        logits_LV = decoder.logits(hidden_1LD)[0]
        following_L = jnp.roll(tokens_L, -1)
        is_text_V = jnp.arange(logits_LV.shape[-1]) < tokens_L[length - 1]
        if words:
            is_text_V = is_text_V.at[np.array(words)].set(True)
        chance_LV = jax.nn.softmax(jnp.where(is_text_V, logits_LV, -jnp.inf))
        return smooth_LS, jnp.take_along_axis(chance_LV, following_L[:, None], axis=1)[:, 0]

    return jax.lax.map(row, tuple(batch))


def standardise(
    scores_HLS: Float[Array, "H L S"], length: Int[Array, ""], audio_length: Int[Array, ""]
) -> Float[Array, "H L S"]:
    """Attention of some heads, each position's over the tokens brought to mean 0, deviation 1, and
    filtered along the positions."""
    is_audio_S = jnp.arange(scores_HLS.shape[-1]) < audio_length
    is_token_L1 = jnp.arange(scores_HLS.shape[1])[:, None] < length
    weights_HLS = jax.nn.softmax(jnp.where(is_audio_S, scores_HLS, -jnp.inf))
    mean_H1S = weights_HLS.mean(1, keepdims=True, where=is_token_L1)
    deviation_H1S = weights_HLS.std(1, keepdims=True, where=is_token_L1)
    standard_HLS = (weights_HLS - mean_H1S) / jnp.maximum(deviation_H1S, 1e-12)
    return median_filter(standard_HLS, audio_length)


def median_filter(
    x: Float[Array, "... S"], length: Int[Array, ""], width: int = FILTER
) -> Float[Array, "... S"]:
    """Running median over the first `length` positions, mirrored at both ends."""
    place_S, last = jnp.arange(x.shape[-1]), length - 1
    window = []
    for offset in range(-(width // 2), width // 2 + 1):
        mirrored_S = last - jnp.abs(last - jnp.abs(place_S + offset))
        window.append(x[..., jnp.clip(mirrored_S, 0, last)])
    for end in range(width - 1, width // 2 - 1, -1):  # the larger half sinks to the end
        for index in range(end):
            lower, upper = window[index], window[index + 1]
            window[index], window[index + 1] = jnp.minimum(lower, upper), jnp.maximum(lower, upper)
    return window[width // 2]


def time_warp(
    cost_LS: Float[np.ndarray, "L S"],
) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """Rows and columns of the cheapest way from the first corner to the last one.

    A step goes down, right or both. Cells of one antidiagonal depend on the two before it only, so
    each is one vectorised step.
    """
    rows, columns = cost_LS.shape
    step = np.full((rows + 1, columns + 1), 2, np.int8)  # 0 from both, 1 from above, 2 from left
    step[:, 0] = 1
    older, old = np.full((2, rows + 1), np.inf)
    older[0] = 0
    for diagonal in range(2, rows + columns + 1):
        row = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        both, above, left = older[row - 1], old[row - 1], old[row]
        choice = np.where((above < both) & (above < left), 1, 2)
        choice[(both < above) & (both < left)] = 0
        new = np.full(rows + 1, np.inf)
        before = np.choose(choice, (both, above, left))
        new[row] = cost_LS[row - 1, diagonal - row - 1] + before
        step[row, diagonal - row] = choice
        older, old = old, new
    path, row, column = [], rows, columns
    while row and column:
        path.append((row - 1, column - 1))
        taken = step[row, column]
        row, column = row - (taken != 2), column - (taken != 1)
    path += [(0, place - 1) for place in range(column, 0, -1)] if not row else []
    down, right = np.array(path[::-1]).T
    return down, right


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
    nearly as well as the best one are kept. After training, the copied heads need not be the best.
    """
    hypotheses = recognize(teacher, waveforms_BN, language=language)
    padded_BN = pad_batch(waveforms_BN)
    multilingual, prompt = teacher.tokens.multilingual, teacher.tokens.prompt
    prompts = [prompt(one.language if multilingual else None) for one in hypotheses]
    frames = [round(100 * second) for second in seconds]
    texts = [one.tokens for one in hypotheses]
    ours_BSE, theirs_BSD = (
        encode_audio(one, padded_BN, drafting=False).model_BSD for one in (student, teacher)
    )
    batch = alignment_input(teacher, theirs_BSD, prompts, texts, frames)
    target_BLS, _ = token_attention(
        teacher.spec, teacher.params["decoder"], batch, heads_of(teacher)
    )
    batch = batch._replace(audio_BSD=ours_BSE)
    likeness_BNH = correlations(student.spec, student.params["decoder"], batch, target_BLS)
    mean_NH = np.asarray(likeness_BNH)[: len(hypotheses)].mean(0)
    places = np.argwhere(mean_NH >= mean_NH.max() - BEHIND)
    return tuple((int(layer), int(head)) for layer, head in places)


@by_clip(static=("spec",))
def correlations(
    spec: Spec, params: Params, batch: AlignmentInput, target_BLS: Float[Array, "B L S"]
) -> Float[Array, "B N H"]:
    """Pearson's correlation of each head's attention with the target. params: the decoder's."""
    decoder = spec.decoder(params)

    def row(one: tuple[Array, ...]) -> Array:
        audio_SD, tokens_L, length, audio_length, target_LS = one
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

    return jax.lax.map(row, (*batch, target_BLS))
