"""Times of words: the cross-attention of the heads that follow speech, and one path through it
(dynamic time warping), as in openai-whisper.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flax_distil.decode.recognizer import Recognizer
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.model.spec import Params, Spec
from flax_distil.parallel.clips import by_clip
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens
from flax_distil.transcribe.result import Word

PREPENDED = "\"'“¿([{-"  # punctuation that belongs to the word after it
APPENDED = "\"'.。,，!！?？:：”)]}、"  # and that to the word before it
SENTENCE_END = ".。!！?？"
FILTER = 7  # width of the median filter, in audio positions
LONGEST_WORD = 0.7  # seconds that the median word may have, where long words are cut
SLACK = 0.5  # seconds that a segment's own time has to differ by to be preferred
BY_CHARACTER = ("zh", "ja", "th", "lo", "my", "yue")  # openai-whisper's: a character is a word
LENGTHS = (32, 64, 128, 256)  # texts are padded to one of these, so that few programs compile


class Aligned(NamedTuple):
    """A word, its tokens and its seconds in the window."""

    word: str
    tokens: tuple[int, ...]
    start: float
    end: float
    probability: float


class TextSpan(NamedTuple):
    """Part of a window's text: its tokens and its seconds in the whole audio."""

    tokens: Sequence[int]
    start: float
    end: float


class TimedSpan(NamedTuple):
    """A span with its words, and the start and end that follow from them."""

    start: float
    end: float
    words: tuple[Word, ...]


def word_timestamps(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    windows: Sequence[Sequence[TextSpan]],
    languages: Sequence[str],
    task: str = "transcribe",
    frames: Sequence[int] | None = None,
    offsets: Sequence[float] | None = None,
    last_speech: Sequence[float] | None = None,
) -> list[list[TimedSpan]]:
    """The words of every window's spans.

    audio_BSD: audio states; the first rows are the windows'. frames: those of 10 ms that are audio
    and not padding, a window. offsets: seconds at which the windows begin. last_speech: when the
    last word before each window ended.
    """
    zeros = [0.0] * len(windows)
    texts = [[token for span in spans for token in span.tokens] for spans in windows]
    aligned = align_words(recognizer, audio_BSD, texts, languages, task, frames)
    is_text = recognizer.tokens.is_text
    return [
        assign_words(*row, is_text)
        for row in zip(aligned, windows, offsets or zeros, last_speech or zeros, strict=True)
    ]


def align_words(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    texts: Sequence[Sequence[int]],
    languages: Sequence[str],
    task: str = "transcribe",
    frames: Sequence[int] | None = None,
) -> list[list[Aligned]]:
    """Every text's words with their seconds in the window; punctuation is separate.

    texts: tokens a window; timestamps among them, and what the context cannot hold, are left out.
    """
    tokens, spec = recognizer.tokens, recognizer.spec
    prompts = [
        tokens.prompt(language if tokens.multilingual else None, task) for language in languages
    ]
    room = spec.dims.text_positions - 1 - max(map(len, prompts), default=0)  # 1 is the end of text
    texts = [[token for token in text if tokens.is_text(token)][:room] for text in texts]
    padded, lengths, audio_lengths = pad_texts(tokens, spec, prompts, texts, len(audio_BSD), frames)
    heads = recognizer.alignment_heads or upper_half(spec)
    inputs, words = (audio_BSD, padded, lengths, audio_lengths), tuple(tokens.words)
    attention, probability = jax.device_get(
        token_attention(spec, recognizer.params["decoder"], *inputs, heads, words)
    )
    words_of_texts = []
    for index, (prompt, text, language) in enumerate(zip(prompts, texts, languages, strict=True)):
        rows_of_text = slice(len(prompt) - 1, len(prompt) + len(text))
        path = attention[index, rows_of_text, : audio_lengths[index]]
        chances = probability[index, rows_of_text]
        words_of_texts.append(
            _words(tokens, text, language, path, chances) if text and path.size else []
        )
    return words_of_texts


def pad_texts(
    tokens: WhisperTokens,
    spec: Spec,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    batch: int,
    frames: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of `token_attention` for `batch` rows: tokens [B L] (prompt, text and end of
    text), their lengths, and numbers of audio positions."""
    rows = [[*prompt, *text, tokens.eot] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(map(len, rows), default=0)
    width = next((length for length in LENGTHS if longest <= length), spec.dims.text_positions)
    padded = np.full((batch, width), tokens.eot, np.int32)
    lengths = np.full(batch, len(prompts[0]) + 1 if prompts else 1, np.int32)
    audio_lengths = np.full(batch, spec.dims.audio_positions, np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)], lengths[index] = row, len(row)
    if frames is not None:
        audio_lengths[: len(rows)] = np.minimum(frames, CHUNK_FRAMES) // 2
    return padded, lengths, audio_lengths


def upper_half(spec: Spec) -> tuple[tuple[int, int], ...]:
    """All heads of the later half of the layers, for a model whose heads are not known."""
    layers, heads = spec.dims.decoder_layers, spec.dims.decoder_heads
    return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))


@by_clip(static=("spec", "heads", "words"))
def token_attention(
    spec: Spec,
    params: Params,
    audio_BSD: Float[Array, "B S D"],
    tokens_BL: Int[Array, "B L"],
    lengths_B: Int[Array, " B"],
    audio_length_B: Int[Array, " B"],
    heads: tuple[tuple[int, int], ...],
    words: tuple[int, ...] = (),
) -> tuple[Float[Array, "B L S"], Float[Array, "B L"]]:
    """The attention of each token to each audio position, and the next token's probability.

    params: the decoder's. lengths, audio_lengths: tokens and audio positions without padding; the
    last token is the end of text. heads: (layer, head) of those that follow the speech. words: ids
    of text after the timestamps.
    """
    decoder = spec.decoder(params)

    def row(arguments: tuple[Array, ...]) -> tuple[Array, Array]:
        audio_SD, tokens_L, length, audio_length = arguments
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

    return jax.lax.map(row, (audio_BSD, tokens_BL, lengths_B, audio_length_B))


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


def split_words(
    tokens: WhisperTokens, text: Sequence[int], language: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Words with their tokens: by spaces, or by characters where a language has no spaces.

    A word keeps the space before it; punctuation is a word.
    """
    characters = split_characters(tokens, text)
    if language in BY_CHARACTER:
        return characters
    words: list[tuple[str, tuple[int, ...]]] = []
    for part, ids in characters:
        if not words or part.startswith(" ") or part.strip() in string.punctuation:
            words.append((part, ids))
        else:
            word, earlier = words[-1]
            words[-1] = (word + part, earlier + ids)
    return words


def split_characters(
    tokens: WhisperTokens, text: Sequence[int]
) -> list[tuple[str, tuple[int, ...]]]:
    """The shortest runs of tokens that are whole characters."""
    broken = "\N{REPLACEMENT CHARACTER}"
    whole, parts, run = tokens.decode(text), [], []
    offset = 0
    for token in text:
        run.append(token)
        part = tokens.decode(run)
        place = offset + part.find(broken)
        # The text itself may contain a broken character.
        if broken not in part or whole[place : place + 1] == broken:
            parts.append((part, tuple(run)))
            offset, run = offset + len(part), []
    return parts


def merge_punctuation(words: Sequence[Aligned]) -> list[Aligned]:
    """Opening punctuation joins the word after it, closing punctuation the one before it.

    The times stay those of the word.
    """
    opened: list[Aligned] = []  # from the last to the first
    for word in reversed(words):
        opening = word.word.startswith(" ") and word.word.strip() in PREPENDED
        if opening and opened:
            following = opened[-1]
            joined = (word.word + following.word, word.tokens + following.tokens)
            opened[-1] = following._replace(word=joined[0], tokens=joined[1])
        else:
            opened.append(word)
    merged: list[Aligned] = []
    for word in reversed(opened):
        if merged and not merged[-1].word.endswith(" ") and word.word in APPENDED:
            before = merged[-1]
            joined = (before.word + word.word, before.tokens + word.tokens)
            merged[-1] = before._replace(word=joined[0], tokens=joined[1])
        else:
            merged.append(word)
    return merged


def assign_words(
    words: Sequence[Aligned],
    spans: Sequence[TextSpan],
    offset: float,
    last_speech: float,
    is_text: Callable[[int], bool],
) -> list[TimedSpan]:
    """The words of a window to its spans; words that are too long at a pause are cut.

    offset: seconds at which the window begins. last_speech: when the last word before it ended.
    is_text: of a token, whether it belongs to a word.
    """
    durations = [word.end - word.start for word in words if word.end > word.start]
    median = min(LONGEST_WORD, float(np.median(durations))) if durations else 0.0
    rest = merge_punctuation(_cut_at_sentence_ends(words, 2 * median))
    shared = []
    for span in spans:
        missing = sum(map(is_text, span.tokens))
        mine = []
        while rest and missing > 0:
            word = rest.pop(0)
            missing -= len(word.tokens)
            start, end = (round(offset + time, 2) for time in (word.start, word.end))
            mine.append(Word(word.word, start, end, word.probability))
        timed = (
            _fit(mine, span, last_speech, median) if mine else TimedSpan(span.start, span.end, ())
        )
        last_speech = timed.end if mine else last_speech
        shared.append(timed)
    return shared


def _words(
    tokens: WhisperTokens,
    text: Sequence[int],
    language: str,
    attention_LS: np.ndarray,
    chances: np.ndarray,
) -> list[Aligned]:
    """Words from the attention before and after each token of a text."""
    rows, columns = time_warp(-attention_LS.astype(np.float64))
    jumps = np.diff(rows, prepend=-1) > 0
    seconds = columns[jumps] * TIMESTAMP_STEP
    words, first = [], 0
    for word, ids in split_words(tokens, text, language):
        last = first + len(ids)
        times = float(seconds[first]), float(seconds[last])
        words.append(Aligned(word, ids, *times, float(chances[first:last].mean())))
        first = last
    return words


def _cut_at_sentence_ends(words: Sequence[Aligned], longest: float) -> list[Aligned]:
    """Around the end of a sentence the silence belongs to neither word."""
    cut = list(words)
    for index in range(1, len(cut)):
        word, before = cut[index], cut[index - 1]
        if word.end - word.start > longest:
            if word.word in SENTENCE_END:
                cut[index] = word._replace(end=word.start + longest)
            elif before.word in SENTENCE_END:
                cut[index] = word._replace(start=word.end - longest)
    return cut


def _fit(words: list[Word], span: TextSpan, last_speech: float, median: float) -> TimedSpan:
    """Cuts words that are too long after a pause, and agrees with the span on start and end."""
    longest, first = 2 * median, words[0]
    second = words[1] if len(words) > 1 else None
    long_first = first.end - first.start > longest
    long_pair = second is not None and second.end - first.start > 2 * longest
    if first.end - last_speech > 4 * median and (long_first or long_pair):
        if second is not None and second.end - second.start > longest:
            boundary = max(second.end / 2, second.end - longest)
            first, words[1] = replace(first, end=boundary), replace(second, start=boundary)
        first = replace(first, start=max(0, first.end - longest))
    start = first.start
    if span.start < first.end and span.start - SLACK > first.start:
        first, start = replace(first, start=max(0, min(first.end - median, span.start))), span.start
    words[0] = first
    last = words[-1]
    end = last.end
    if span.end > last.start and span.end + SLACK < last.end:
        words[-1], end = replace(last, end=max(last.start + median, span.end)), span.end
    return TimedSpan(start, end, tuple(words))
