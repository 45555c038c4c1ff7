"""Long audio in overlapping chunks, decoded in batches and merged where they overlap.

The paper's algorithm (section 6.2): the larger the batch the faster, and no timestamps are needed.
Where the model predicts timestamps, they divide the text into segments, and the rest of a chunk
after its last one is decoded again: a second pass finds what the first left out.

Whole texts are aligned as in Transformers' pipeline. Its cuts at timestamps inside an overlap are
not followed: they repeat a sentence that two chunks spell differently.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from typing import NamedTuple

import numpy as np

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.audio.log_mel import HOP
from flax_distil.decode.recognizer import decode, encode_audio, likeliest_languages, pad_batch
from flax_distil.decode.search import Acceptance, Hypothesis, Window
from flax_distil.options import ChunkedOptions
from flax_distil.text.tokens import TIMESTAMP_STEP, WhisperTokens
from flax_distil.text.wer import compression_ratio
from flax_distil.transcription import long_form
from flax_distil.transcription.long_form import LogMel, LongFormJob, Progress, Samples
from flax_distil.transcription.transcript import Segment, Transcript

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


@dataclass(eq=False)
class Chunk:
    """A piece of a recording that has `pieces` of them, and how far it has been decoded.

    start: its window's language and prompt.
    """

    recording: int
    pieces: int
    piece: Piece
    samples: Samples
    start: Window
    seek: int = 0  # frames
    mel_TM: LogMel | None = None
    tokens: list[int] = field(default_factory=list)  # timestamps are from the chunk's start
    hypotheses: list[Hypothesis] = field(default_factory=list)  # by window

    @property
    def frames(self) -> int:
        """Of the chunk."""
        return -(-self.samples.size // HOP)

    @property
    def window(self) -> Window:
        """What the next window is decoded with."""
        return replace(self.start, seed=self.start.seed + self.piece.start + self.seek * HOP)

    def next_mel(self, mels: int) -> LogMel:
        """The log-mel of the next window."""
        if self.mel_TM is None:
            self.mel_TM = long_form.clip_mel(pad_or_trim(self.samples), mels)
        # Behind the chunk: silence in its first window, as in Transformers, nothing in the others.
        size = self.frames - self.seek if self.seek else len(self.mel_TM)
        return long_form.pad_window(self.mel_TM, self.seek, size)

    def unfinished(self) -> bool:
        """Whether any sound is left that is not farther from a neighbour's edges.

        Digital silence does not count.
        """
        return bool(self.samples[self.seek * HOP : self.piece.last - self.piece.start].any())

    def add(self, hypothesis: Hypothesis, times: range | None) -> None:
        """Adds a window's text; without timestamps (None) the chunk is complete."""
        self.hypotheses.append(hypothesis)
        if times is None:
            self.tokens, self.seek = list(hypothesis.tokens), self.frames
            return
        spans, moved = long_form.split_segments(hypothesis.tokens, times, self.frames - self.seek)
        later, last = (n // long_form.FRAMES_PER_STEP for n in (self.seek, self.frames))
        self.seek += moved
        # The rest is decoded again, or overlaps the next chunk's text.
        ids = hypothesis.tokens
        if self.unfinished():
            ids = chain.from_iterable(ids for *_, ids in spans)
        self.tokens += [
            min(token + later, times.start + last) if token in times else token for token in ids
        ]


def transcribe_in_chunks(job: LongFormJob, waveforms: Iterable[Samples]) -> Iterator[Progress]:
    """Transcribes each recording by chunks; those of several recordings share a batch.

    A segment is the text of one chunk, or of the time between two timestamps where the options ask
    for them.
    """
    tokens, waiting = job.recognizer.tokens, cut_all(job, waveforms)
    left: list[Chunk] = []
    done: dict[int, list[Chunk]] = {}  # of the recordings that are not complete
    acceptance: Acceptance | None = None
    while chunks := left + list(islice(waiting, job.batch_size - len(left))):
        if left := [one for one in chunks if one.unfinished()]:
            acceptance = Acceptance.total((acceptance, decode_chunks(job, left, acceptance)))
        left = [one for one in left if one.unfinished()]
        for one in chunks:
            if one in left:
                continue
            one.mel_TM, transcript = None, None
            known = done.setdefault(one.recording, [])
            known.append(one)
            if len(known) == one.pieces:
                transcript = assemble(tokens, done.pop(one.recording), job.options.timestamps)
            yield one.recording, (one.piece.last - one.piece.first) / SAMPLE_RATE, transcript


def cut_all(job: LongFormJob, waveforms: Iterable[Samples]) -> Iterator[Chunk]:
    """The chunks of all recordings; where a language is not given it is that of the first 30 s."""
    recognizer = job.recognizer
    for recording, waveform in enumerate(waveforms):
        start = job.start
        if start.language is None and recognizer.tokens.multilingual:
            states = encode_audio(recognizer, pad_or_trim(waveform)[None], drafting=False)
            start = replace(start, language=likeliest_languages(recognizer, states.model_BSD)[0])
        pieces = cut_chunks(waveform.size, job.chunked)
        for piece in pieces:
            samples = waveform[piece.start : piece.stop]
            yield Chunk(recording, len(pieces), piece, samples, start)


def decode_chunks(
    job: LongFormJob, chunks: Sequence[Chunk], acceptance: Acceptance | None = None
) -> Acceptance | None:
    """Adds the next window of each chunk; returns the counts of its draft tokens.

    acceptance: of the draft tokens so far, which decides whether the assistant pays.
    """
    recognizer, timestamps = job.recognizer, job.options.timestamps
    if timestamps:  # a chunk may be continued, from its log-mel
        sounds = [one.next_mel(recognizer.spec.dims.mels) for one in chunks]
    else:
        sounds = [pad_or_trim(one.samples) for one in chunks]
    assistant = recognizer.assistant
    drafting = assistant is not None and assistant.pays(acceptance)
    states = encode_audio(recognizer, pad_batch(np.stack(sounds)), drafting=drafting)
    hypotheses = decode(recognizer, states, job.options, [one.window for one in chunks])
    for one, hypothesis in zip(chunks, hypotheses, strict=True):
        one.add(hypothesis, recognizer.tokens.times if timestamps else None)
    return Acceptance.total(one.acceptance for one in hypotheses)


def assemble(tokens: WhisperTokens, chunks: Iterable[Chunk], timestamps: bool) -> Transcript:
    """The transcript of a recording's chunks, in any order."""
    chunks = sorted(chunks, key=lambda one: one.piece.start)
    pieces, texts = [one.piece for one in chunks], [one.tokens for one in chunks]
    if timestamps:
        spans = merge_timed(texts, pieces, tokens.times)
    else:
        spans = [
            ChunkSpan(place, piece.first / SAMPLE_RATE, piece.last / SAMPLE_RATE, ids)
            for place, (piece, ids) in enumerate(zip(pieces, merge(texts), strict=True))
            if ids
        ]
    segments = []
    for number, span in enumerate(spans):
        chunk = chunks[span.chunk]
        windows = chunk.hypotheses
        scores = [one.mean_log_probability for one in windows]
        weights = [len(one.tokens) + 1 for one in windows]
        segments.append(
            Segment(
                id=number,
                seek=chunk.piece.start // HOP,
                start=span.start,
                end=span.end,
                text=tokens.decode(span.tokens),
                tokens=span.tokens,
                temperature=windows[0].temperature,
                avg_logprob=float(np.average(scores, weights=weights)),
                compression_ratio=compression_ratio(tokens.decode(chunk.tokens).strip()),
                no_speech_prob=windows[0].no_speech_probability,
            )
        )
    text = tokens.decode(chain.from_iterable(span.tokens for span in spans))
    acceptance = Acceptance.total(one.acceptance for chunk in chunks for one in chunk.hypotheses)
    return Transcript(text, tuple(segments), chunks[0].start.language or "en", acceptance)


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
    plain = [[token for one in spans for token in one.tokens] for spans in chunks]
    merged: list[ChunkSpan] = []
    unfinished = False  # whether the last segment goes on in the next chunk
    for spans, (begin, end) in zip(chunks, kept_ranges(plain, where_same=True), strict=True):
        at = 0
        for one in spans:
            inside = one.tokens[max(begin - at, 0) : max(end - at, 0)]
            if inside and unfinished and at < begin:
                last = merged.pop()
                merged.append(ChunkSpan(one.chunk, last.start, one.end, (*last.tokens, *inside)))
            elif inside:
                before = merged[-1].end if merged else 0.0
                start = min(max(one.start, before), one.end)
                merged.append(one._replace(start=start, tokens=inside))
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


def merge(texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What each text adds to those before it, where neighbours overlap.

    As in Transformers' pipeline: the end of one and the beginning of the next are aligned
    where most tokens agree, and the halves of that overlap come from the nearer one.
    """
    kept = zip(texts, kept_ranges(texts), strict=True)
    return [tuple(text[begin:end]) for text, (begin, end) in kept]


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
