"""Long audio in overlapping chunks, all of them decoded in batches, merged where they overlap.

The paper's algorithm (section 6.2): as fast as the batch is large, and no timestamps are needed;
where the model was taught some, they cut the text into segments.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import DecodeOptions, Hypothesis, total
from flax_distil.decode.recognizer import (
    Recognizer,
    Window,
    decode,
    detect,
    drafter_hears,
    fill,
    listen,
    prepare,
)
from flax_distil.text.tokens import TIMESTAMP_STEP
from flax_distil.transcribe.options import ChunkedOptions
from flax_distil.transcribe.result import Segment, Transcript

FRAME_RATE = 100  # in which openai-whisper counts `seek`
LONGER_IS_BETTER = 10_000  # 1 / the weight of an overlap's length beside its share of matches


class Span(NamedTuple):
    """Part of the text: the chunk that ended it, seconds of start and end, tokens."""

    chunk: int
    start: float
    end: float
    tokens: tuple[int, ...]


class Chunk(NamedTuple):
    """A piece of a recording. start, stop: samples. first, last: what it alone is there for."""

    recording: int
    start: int
    first: int
    last: int
    samples: Float32[np.ndarray, "n"]
    language: str
    final: bool


def transcribe_in_chunks(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions,
    chunked: ChunkedOptions,
    batch_size: int = 8,
    assistant: Assistant | None = None,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    A segment is what was said in one chunk, or lies between two of the model's timestamps where
    `options` ask for them. Chunks of several recordings share a batch.

    Raises:
        InputError: the model lacks the language or task, the device the memory, or the assistant
            cannot help this search.
    """
    known, previous = prepare(recognizer, options, batch_size, assistant)
    chunks = cut_all(recognizer, waveforms, known, chunked)
    heard: list[tuple[Chunk, Hypothesis]] = []  # of the recordings that are not complete
    while batch := list(islice(chunks, batch_size)):
        # Where there is no sound at all, no text would be believed.
        sounding = [place for place, one in enumerate(batch) if one.samples.any()]
        found = [Hypothesis((), "", one.language, 0.0, 1.0, 1.0) for one in batch]
        if sounding:
            some = [batch[place] for place in sounding]
            texts = hear(recognizer, some, options, previous, assistant)
            for place, hypothesis in zip(sounding, texts, strict=True):
                found[place] = hypothesis
        for chunk, hypothesis in zip(batch, found, strict=True):
            heard.append((chunk, hypothesis))
            transcript = None
            if chunk.final:
                transcript, heard = assemble(recognizer, heard, options.timestamps), []
            yield chunk.recording, (chunk.last - chunk.first) / SAMPLE_RATE, transcript


def hear(
    recognizer: Recognizer,
    batch: Sequence[Chunk],
    options: DecodeOptions,
    previous: tuple[int, ...],
    assistant: Assistant | None,
) -> list[Hypothesis]:
    """What is said in each chunk."""
    windows = [
        Window(one.language, previous, options.temperature, options.seed + one.start)
        for one in batch
    ]
    waveforms_BN = fill(np.stack([pad_or_trim(one.samples) for one in batch]))
    audio_BSD = listen(recognizer.spec, recognizer.params["encoder"], waveforms_BN)
    heard_BSE = drafter_hears(assistant, listen, waveforms_BN)
    return decode(recognizer, audio_BSD, options, windows, assistant, heard_BSE)


def cut_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    known: str | None,
    chunked: ChunkedOptions,
) -> Iterator[Chunk]:
    """The chunks of all recordings, in the known language or else that of each one's first 30 s."""
    for recording, waveform in enumerate(waveforms):
        language = known or language_of(recognizer, waveform)
        pieces = cut(waveform.size, chunked)
        for number, (start, stop, first, last) in enumerate(pieces):
            final = number == len(pieces) - 1
            samples = waveform[start:stop]
            yield Chunk(recording, start, first, last, samples, language, final)


def language_of(recognizer: Recognizer, waveform: Float32[np.ndarray, "n"]) -> str:
    """The code of the language of the first 30 s."""
    if not recognizer.tokens.multilingual:
        return "en"
    first = pad_or_trim(waveform)[None]
    return detect(recognizer, listen(recognizer.spec, recognizer.params["encoder"], first))[0]


def cut(samples: int, chunked: ChunkedOptions) -> list[tuple[int, int, int, int]]:
    """(start, stop, first, last) of each chunk in samples.

    From first to last a chunk is heard alone or farther from its edges than its neighbours.
    """
    length = round(chunked.chunk_length * SAMPLE_RATE)
    overlap = round(chunked.overlap * SAMPLE_RATE)
    pieces = []
    for start in range(0, max(samples, 1), length - 2 * overlap):
        final = start + length >= samples
        stop = min(start + length, samples)
        first = start + overlap if start else 0
        pieces.append((start, stop, first, stop if final else stop - overlap))
        if final:
            break
    return pieces


def assemble(
    recognizer: Recognizer, heard: Sequence[tuple[Chunk, Hypothesis]], timestamps: bool
) -> Transcript:
    """The transcript of a recording's chunks."""
    tokens = recognizer.tokens
    chunks, texts = [chunk for chunk, _ in heard], [found.tokens for _, found in heard]
    if timestamps:
        spans = merge_timed(texts, chunks, tokens.timestamp_begin)
    else:
        parts = zip(chunks, merge(texts), strict=True)
        spans = [
            Span(place, chunk.first / SAMPLE_RATE, chunk.last / SAMPLE_RATE, part)
            for place, (chunk, part) in enumerate(parts)
            if chunk.last > chunk.first
        ]
    segments = []
    for span in spans:
        chunk, found = heard[span.chunk]
        segments.append(
            Segment(
                id=len(segments),
                seek=chunk.start * FRAME_RATE // SAMPLE_RATE,
                start=span.start,
                end=span.end,
                text=tokens.decode(span.tokens),
                tokens=span.tokens,
                temperature=found.temperature,
                avg_logprob=found.mean_log_probability,
                compression_ratio=found.compression_ratio,
                no_speech_prob=found.no_speech_probability,
            )
        )
    text = tokens.decode(flat([span.tokens for span in spans]))
    tally = total(found.tally for _, found in heard)
    return Transcript(text, tuple(segments), chunks[0].language, tally)


def merge_timed(
    texts: Sequence[Sequence[int]], chunks: Sequence[Chunk], timestamp_begin: int
) -> list[Span]:
    """Texts with timestamps as one, cut at the timestamps, as in Transformers' pipeline.

    A timestamp in the overlap with a neighbour may split what the other heard whole, so it cuts
    nothing; what the two heard between the cuts is laid over each other. The last timestamp of a
    chunk is never believed where another one overlaps its end.
    """
    spans: list[Span] = []
    waiting: list[Sequence[int]] = []  # texts since the last cut
    start, twin = None, False  # where the segment began; whether the next timestamp is passed over
    for place, (ids, chunk) in enumerate(zip(texts, chunks, strict=True)):
        offset = chunk.start / SAMPLE_RATE
        first, last = believed(ids, chunk, timestamp_begin)
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
        end = chunks[-1].last / SAMPLE_RATE
        spans.append(
            Span(len(texts) - 1, start if start is not None else before, end, flat(merge(waiting)))
        )
    return spans


def believed(ids: Sequence[int], chunk: Chunk, timestamp_begin: int) -> tuple[float, float]:
    """The first timestamp that may cut a chunk's text, and the first one behind it that may not."""
    left = (chunk.first - chunk.start) / SAMPLE_RATE
    right = (chunk.last - chunk.start) / SAMPLE_RATE
    first, last = timestamp_begin + left / TIMESTAMP_STEP, float("inf")
    if chunk.start + chunk.samples.size > chunk.last:
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
