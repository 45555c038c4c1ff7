"""Where overlapping chunks are cut, and how their texts become one.

As in Transformers' pipeline, where it aligns whole texts. Its cuts at timestamps inside an overlap
are not followed: they repeat a sentence that two chunks spell differently.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.options import ChunkedOptions
from flax_distil.text.tokens import TIMESTAMP_STEP

LONGER_IS_BETTER = 10_000  # 1 / the weight of an overlap's length beside its share of matches


class Piece(NamedTuple):
    """A chunk's place in its recording, in samples.

    Samples from first to last are farther from its edges than from its neighbours'.
    """

    start: int
    stop: int
    first: int
    last: int


class ChunkSpan(NamedTuple):
    """Part of the text: the chunk that ended it, seconds of start and end, tokens."""

    chunk: int
    start: float
    end: float
    tokens: tuple[int, ...]


def cut_chunks(samples: int, chunked: ChunkedOptions) -> list[Piece]:
    """The chunks of a recording."""
    length = round(chunked.chunk_length * SAMPLE_RATE)
    overlap = round(chunked.overlap * SAMPLE_RATE)
    pieces = []
    for start in range(0, max(samples, 1), length - 2 * overlap):
        final = start + length >= samples
        stop = min(start + length, samples)
        first = start + overlap if start else 0
        pieces.append(Piece(start, stop, first, stop if final else stop - overlap))
        if final:
            break
    return pieces


def merge_timed(
    texts: Sequence[Sequence[int]], pieces: Sequence[Piece], times: range
) -> list[ChunkSpan]:
    """Texts with timestamps as one list of segments, aligned as `merge` does.

    They are cut where both agree: in the middle of an overlap half a word of one may meet
    half a word of the other. A segment that neighbours share has the start of the one and the end
    of the other. times: the ids of timestamps.
    """
    chunks = [
        spans_of(ids, piece, place, times)
        for place, (ids, piece) in enumerate(zip(texts, pieces, strict=True))
    ]
    bounds = kept_ranges(
        [concatenate([one.tokens for one in spans]) for spans in chunks], where_same=True
    )
    merged: list[ChunkSpan] = []
    unfinished = False  # whether the last segment goes on in the next chunk
    for spans, (begin, end) in zip(chunks, bounds, strict=True):
        at = 0
        for one in spans:
            inside = one.tokens[max(begin - at, 0) : max(end - at, 0)]
            if inside and unfinished and at < begin:
                last = merged.pop()
                merged.append(ChunkSpan(one.chunk, last.start, one.end, (*last.tokens, *inside)))
            elif inside:
                before = merged[-1].end if merged else 0.0
                merged.append(
                    one._replace(start=min(max(one.start, before), one.end), tokens=inside)
                )
            at += len(one.tokens)
            unfinished = at > end if inside else unfinished
    return merged


def spans_of(ids: Sequence[int], piece: Piece, place: int, times: range) -> list[ChunkSpan]:
    """A chunk's segments; text without a closing timestamp lasts to the chunk's end."""
    spans: list[ChunkSpan] = []
    offset, end = piece.start / SAMPLE_RATE, piece.stop / SAMPLE_RATE
    start, text = offset, []
    for token in ids:
        if token not in times:
            text.append(token)
            continue
        time = round((token - times.start) * TIMESTAMP_STEP + offset, 2)
        if text:
            spans.append(ChunkSpan(place, start, time, tuple(text)))
        start, text = time, []
    return [*spans, ChunkSpan(place, start, end, tuple(text))] if text else spans


def concatenate(parts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The tokens of all parts."""
    return tuple(token for part in parts for token in part)


def merge(texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What each text adds to those before it, where neighbours overlap.

    As in Transformers' pipeline: the end of one and the beginning of the next are aligned
    where most tokens agree, and the halves of that overlap come from the nearer one.
    """
    return [
        tuple(text[begin:end]) for text, (begin, end) in zip(texts, kept_ranges(texts), strict=True)
    ]


def kept_ranges(texts: Sequence[Sequence[int]], where_same: bool = False) -> list[tuple[int, int]]:
    """Where the part of each text that is kept begins and ends (`align_overlap`)."""
    begins, ends = [0], []
    for text, following in pairwise(texts):
        left = np.array(text[begins[-1] :], np.int64)
        end, begin = align_overlap(left, np.array(following, np.int64), where_same)
        ends.append(begins[-1] + end)
        begins.append(begin)
    return list(zip(begins, [*ends, *map(len, texts[-1:])], strict=False))


def align_overlap(left: np.ndarray, right: np.ndarray, where_same: bool) -> tuple[int, int]:
    """Where to leave `left` and where to enter `right`.

    In the middle of the overlap, or at the token nearest to it that both have.
    """
    best, place = 0.0, (left.size, 0)
    for shift in range(1, left.size + right.size):  # how far `right` is pushed over `left`
        start, stop = max(0, left.size - shift), min(left.size, left.size + right.size - shift)
        other = max(0, shift - left.size)
        same = left[start:stop] == right[other : other + stop - start]
        matches = int(same.sum())
        agreement = matches / shift + shift / LONGER_IS_BETTER
        if matches > 1 and agreement > best:
            middle = (stop - start) // 2
            if where_same:
                middle = min(np.flatnonzero(same).tolist(), key=lambda at: abs(at - middle))
            best, place = agreement, (start + middle, other + middle)
    return place
