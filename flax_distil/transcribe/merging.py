"""Where overlapping chunks are cut and how their texts become one: as in Transformers' pipeline."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.text.tokens import TIMESTAMP_STEP
from flax_distil.transcribe.options import ChunkedOptions

LONGER_IS_BETTER = 10_000  # 1 / the weight of an overlap's length beside its share of matches


class Piece(NamedTuple):
    """A chunk's place in its recording, in samples.

    From first to last it is heard alone or farther from its edges than its neighbours.
    """

    start: int
    stop: int
    first: int
    last: int


class Span(NamedTuple):
    """Part of the text: the chunk that ended it, seconds of start and end, tokens."""

    chunk: int
    start: float
    end: float
    tokens: tuple[int, ...]


def cut(samples: int, chunked: ChunkedOptions) -> list[Piece]:
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
    texts: Sequence[Sequence[int]], pieces: Sequence[Piece], timestamp_begin: int
) -> list[Span]:
    """Texts with timestamps as one, cut at the timestamps, as in Transformers' pipeline.

    A timestamp in the overlap with a neighbour may split what the other heard whole, so it cuts
    nothing; what the two heard between the cuts is laid over each other. The last timestamp of a
    chunk is never believed where another one overlaps its end.
    """
    spans: list[Span] = []
    waiting: list[Sequence[int]] = []  # texts since the last cut
    start, twin = None, False  # where the segment began; whether the next timestamp is passed over
    for place, (ids, piece) in enumerate(zip(texts, pieces, strict=True)):
        offset = piece.start / SAMPLE_RATE
        first, last = believed(ids, piece, timestamp_begin)
        text: list[int] = []
        for token in ids:
            if token < timestamp_begin:
                text.append(token)
                continue
            time = round((token - timestamp_begin) * TIMESTAMP_STEP + offset, 2)
            if token >= last:
                twin = True
            elif twin or (waiting and token < first):
                twin = False
            elif start is None:
                start = time
            elif time != start:
                spans.append(Span(place, start, time, flat(merge([*waiting, text]))))
                waiting, text, start = [], [], None
        if text:
            waiting.append(text)
        elif not any(waiting):
            waiting, start = [], None
    if waiting:
        before = spans[-1].end if spans else 0.0
        end = pieces[-1].last / SAMPLE_RATE
        spans.append(
            Span(len(texts) - 1, start if start is not None else before, end, flat(merge(waiting)))
        )
    return spans


def believed(ids: Sequence[int], piece: Piece, timestamp_begin: int) -> tuple[float, float]:
    """The first timestamp that may cut a chunk's text, and the first one behind it that may not."""
    left = (piece.first - piece.start) / SAMPLE_RATE
    right = (piece.last - piece.start) / SAMPLE_RATE
    first, last = timestamp_begin + left / TIMESTAMP_STEP, float("inf")
    if piece.stop > piece.last:
        for token in reversed([token for token in ids if token >= timestamp_begin]):
            if last < float("inf") and (token - timestamp_begin) * TIMESTAMP_STEP < right:
                break
            last = token
    return first, last


def flat(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """All tokens in turn."""
    return tuple(token for part in parts for token in part)


def merge(texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What each text adds to those before it, where neighbours overlap.

    As in Transformers' pipeline: the end of one and the beginning of the next are laid over each
    other where most tokens agree, and the halves of that overlap come from the nearer one.
    """
    parts = []
    left = np.array(texts[0] if texts else (), np.int64)
    for text in texts[1:]:
        right = np.array(text, np.int64)
        end, begin = overlap(left, right)
        parts.append(tuple(left[:end].tolist()))
        left = right[begin:]
    return [*parts, tuple(left.tolist())] if texts else []


def overlap(left: np.ndarray, right: np.ndarray) -> tuple[int, int]:
    """Where to leave `left` and where to enter `right`."""
    best, place = 0.0, (left.size, 0)
    for shift in range(1, left.size + right.size):  # how far `right` is pushed over `left`
        start, stop = max(0, left.size - shift), min(left.size, left.size + right.size - shift)
        other = max(0, shift - left.size)
        matches = int((left[start:stop] == right[other : other + stop - start]).sum())
        agreement = matches / shift + shift / LONGER_IS_BETTER
        if matches > 1 and agreement > best:
            best, place = agreement, ((start + stop) // 2, other + (stop - start) // 2)
    return place
