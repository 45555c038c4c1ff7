"""Times of words, as in openai-whisper: one path through the attention between text and audio
(dynamic time warping), punctuation, pauses, and text that is probably hallucinated.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from flax_distil.decode.recognizer import Recognizer
from flax_distil.model.dims import CHUNK_SECONDS
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens
from flax_distil.transcription.alignment import (
    alignment_input,
    heads_of,
    time_warp,
    token_attention,
)
from flax_distil.transcription.transcript import Segment, Word

PREPENDED = "\"'“¿([{-"  # punctuation that belongs to the word after it
APPENDED = "\"'.。,，!！?？:：”)]}、"  # and that to the word before it
SENTENCE_END = ".。!！?？"
LONGEST_WORD = 0.7  # seconds that the median word may have, where long words are cut
SLACK = 0.5  # seconds that a segment's own time has to differ by to be preferred
BY_CHARACTER = ("zh", "ja", "th", "lo", "my", "yue")  # openai-whisper's: a character is a word
IMPROBABLE = 0.15  # a word's probability below which it is anomalous
SHORT, LONG = 0.133, 2.0  # seconds of a word beyond which it is anomalous
SHORT_WEIGHT = 15.0  # anomaly of each second that a word is too short
SCORED = 8  # words of a segment that are scored
ANOMALOUS = 3.0  # anomaly of a hallucinated segment; a shorter one needs that of its words alone
EDGE = 2.0  # seconds at a window's edges that count as silence


class Aligned(NamedTuple):
    """A word, its tokens and its seconds in the window."""

    word: str
    tokens: tuple[int, ...]
    start: float
    end: float
    probability: float


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
    batch = alignment_input(recognizer, audio_BSD, prompts, texts, frames)
    decoder, heads, words = recognizer.params["decoder"], heads_of(recognizer), tuple(tokens.words)
    attention_BLS, chance_BL = jax.device_get(token_attention(spec, decoder, batch, heads, words))
    aligned = []
    for index, (prompt, text, language) in enumerate(zip(prompts, texts, languages, strict=True)):
        rows = slice(len(prompt) - 1, len(prompt) + len(text))  # before and after each token
        attention_LS = attention_BLS[index, rows, : batch.audio_length_B[index]]
        aligned.append([])
        if not text or not attention_LS.size:
            continue
        down, right = time_warp(-attention_LS.astype(np.float64))
        seconds = (right[np.diff(down, prepend=-1) > 0] * TIMESTAMP_STEP).tolist()
        chances, first = chance_BL[index, rows], 0
        for word, ids in split_words(tokens, text, language):
            last = first + len(ids)
            chance = float(chances[first:last].mean())
            aligned[-1].append(Aligned(word, ids, seconds[first], seconds[last], chance))
            first = last
    return aligned


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

    def join(first: Aligned, second: Aligned, word: Aligned) -> Aligned:
        return word._replace(word=first.word + second.word, tokens=first.tokens + second.tokens)

    opened: list[Aligned] = []  # from the last to the first
    for word in reversed(words):
        if opened and word.word.startswith(" ") and word.word.strip() in PREPENDED:
            opened[-1] = join(word, opened[-1], opened[-1])
        else:
            opened.append(word)
    merged: list[Aligned] = []
    for word in reversed(opened):
        if merged and not merged[-1].word.endswith(" ") and word.word in APPENDED:
            merged[-1] = join(merged[-1], word, merged[-1])
        else:
            merged.append(word)
    return merged


def assign_words(
    words: Sequence[Aligned],
    segments: Sequence[Segment],
    offset: float,
    last_speech: float,
    is_text: Callable[[int], bool],
) -> list[Segment]:
    """The segments of a window with their words; words that are too long at a pause are cut.

    offset: seconds at which the window begins. last_speech: when the last word before it ended.
    is_text: of a token, whether it belongs to a word.
    """
    durations = [word.end - word.start for word in words if word.end > word.start]
    median = min(LONGEST_WORD, float(np.median(durations))) if durations else 0.0
    rest = merge_punctuation(_cut_at_sentence_ends(words, 2 * median))
    timed = []
    for segment in segments:
        missing = sum(map(is_text, segment.tokens))
        mine = []
        while rest and missing > 0:
            word = rest.pop(0)
            missing -= len(word.tokens)
            start, end = (round(offset + time, 2) for time in (word.start, word.end))
            mine.append(Word(word.word, start, end, word.probability))
        if mine:
            timed.append(_fit(mine, segment, last_speech, median))
            last_speech = timed[-1].end
        else:
            timed.append(replace(segment, words=()))
    return timed


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


def _fit(words: list[Word], segment: Segment, last_speech: float, median: float) -> Segment:
    """Cuts words that are too long after a pause, and agrees with the segment on start and end."""
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
    if segment.start < first.end and segment.start - SLACK > first.start:
        start = segment.start
        first = replace(first, start=max(0, min(first.end - median, start)))
    words[0] = first
    last = words[-1]
    end = last.end
    if segment.end > last.start and segment.end + SLACK < last.end:
        end = segment.end
        words[-1] = replace(last, end=max(last.start + median, end))
    return replace(segment, start=start, end=end, words=tuple(words))


def drop_hallucinations(
    segments: Sequence[Segment],
    threshold: float,
    start: float,
    end: float,
    recording_end: float,
    last_speech: float,
) -> tuple[list[Segment], float | None, bool]:
    """(segments that are kept, seconds at which to resume where that changes, whether it is done).

    A window that begins with a pause and then with an anomalous segment is not done: the next
    window begins after the pause and may recognise it better.

    segments: of one window, with words. threshold: seconds of silence that are worth skipping.
    start, end: seconds of the window. last_speech: when the last word before it ended.
    """
    spoken = [(place, one) for place, one in enumerate(segments) if one.words]
    if spoken and is_anomalous(first := spoken[0][1]) and first.start - start > threshold:
        return [], first.start, False
    for (place, segment), following in zip_longest(spoken, [one for _, one in spoken[1:]]):
        next_word = following.words[0].start if following and following.words else end
        silent_before = (
            segment.start - last_speech > threshold
            or segment.start < threshold
            or segment.start - start < EDGE
        )
        silent_after = (
            next_word - segment.end > threshold
            or (following is not None and is_anomalous(following))
            or start + CHUNK_SECONDS - segment.end < EDGE
        )
        if is_anomalous(segment) and silent_before and silent_after:
            last = recording_end - segment.end < threshold
            resume = recording_end if last else max(start + 1, segment.start)
            return list(segments[:place]), resume, True
        last_speech = segment.end
    return list(segments), None, True


def is_anomalous(segment: Segment) -> bool:
    """Whether a segment's first words are too improbable, too short or too long for speech."""
    words = [one for one in segment.words or () if one.word not in PREPENDED + APPENDED][:SCORED]
    score = sum(map(anomaly, words))
    return score >= ANOMALOUS or score + 0.01 >= len(words)


def anomaly(word: Word) -> float:
    """0 for a usual word; 1 and more for one that is hardly speech."""
    seconds = word.end - word.start
    improbable = float(word.probability < IMPROBABLE)
    return improbable + max(SHORT - seconds, 0) * SHORT_WEIGHT + max(seconds - LONG, 0)
