"""Long audio in overlapping chunks, all of them decoded in batches, merged where they overlap.

The paper's algorithm (section 6.2): as fast as the batch is large, and no timestamps are needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.recognizer import (
    Recognizer,
    Window,
    bucket,
    check_memory,
    checked_language,
    decode,
    detect,
    fill,
    listen,
    text_ids,
)
from flax_distil.errors import InputError
from flax_distil.model.dims import CHUNK_SECONDS
from flax_distil.transcribe.result import Segment, Transcript

FRAME_RATE = 100  # in which openai-whisper counts `seek`
LONGER_IS_BETTER = 10_000  # 1 / the weight of an overlap's length beside its share of matches


@dataclass(frozen=True)
class ChunkedOptions:
    """How the audio is cut."""

    chunk_length: float = 30.0
    """Seconds of a chunk; for distilled models 15 to 25 is better (paper table 20)."""
    stride: float | None = None
    """Seconds that a chunk shares with the next one, on each side; a sixth of it otherwise."""

    @property
    def overlap(self) -> float:
        """The stride, or its default."""
        return self.chunk_length / 6 if self.stride is None else self.stride

    def __post_init__(self):
        if not 0 < self.chunk_length <= CHUNK_SECONDS:
            raise InputError(
                f"chunk_length is {self.chunk_length} s: Whisper hears more than 0 and at most "
                f"{CHUNK_SECONDS} s at a time"
            )
        if not 0 <= 2 * self.overlap < self.chunk_length:
            raise InputError(
                f"a stride of {self.overlap} s on both sides leaves nothing of a chunk of "
                f"{self.chunk_length} s: use less than {self.chunk_length / 2:g} s"
            )


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
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    A segment is what was said in one chunk. Chunks of several recordings share a batch.

    Raises:
        InputError: the model lacks the language or task, or the device the memory.
    """
    options = replace(options, timestamps=False)
    check_memory(recognizer.spec, bucket(batch_size), options)
    checked_language(recognizer, options)
    previous = text_ids(recognizer.tokens, options.prompt)
    chunks = cut_all(recognizer, waveforms, options, chunked)
    heard: list[tuple[Chunk, Hypothesis]] = []  # of the recordings that are not complete
    while batch := list(islice(chunks, batch_size)):
        windows = [
            Window(one.language, previous, options.temperature, options.seed + one.start)
            for one in batch
        ]
        waveforms_BN = fill(np.stack([pad_or_trim(one.samples) for one in batch]))
        audio_BSD = listen(recognizer.spec, recognizer.params["encoder"], waveforms_BN)
        found = decode(recognizer, audio_BSD, options, windows)
        for chunk, hypothesis in zip(batch, found, strict=True):
            heard.append((chunk, hypothesis))
            transcript = None
            if chunk.final:
                transcript, heard = assemble(recognizer, heard), []
            yield chunk.recording, (chunk.last - chunk.first) / SAMPLE_RATE, transcript


def cut_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions,
    chunked: ChunkedOptions,
) -> Iterator[Chunk]:
    """The chunks of all recordings; each recording's language is that of its first 30 s."""
    known = checked_language(recognizer, options)
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


def assemble(recognizer: Recognizer, heard: Sequence[tuple[Chunk, Hypothesis]]) -> Transcript:
    """The transcript of a recording's chunks."""
    tokens = recognizer.tokens
    # Where there is no sound at all, no text is believed.
    parts = merge([found.tokens if chunk.samples.any() else () for chunk, found in heard])
    segments = [
        Segment(
            id=number,
            seek=chunk.start * FRAME_RATE // SAMPLE_RATE,
            start=chunk.first / SAMPLE_RATE,
            end=chunk.last / SAMPLE_RATE,
            text=tokens.decode(part),
            tokens=part,
            temperature=found.temperature,
            avg_logprob=found.mean_log_probability,
            compression_ratio=found.compression_ratio,
            no_speech_prob=found.no_speech_probability,
        )
        for number, ((chunk, found), part) in enumerate(zip(heard, parts, strict=True))
        if chunk.last > chunk.first
    ]
    text = tokens.decode([token for part in parts for token in part])
    return Transcript(text, tuple(segments), heard[0][0].language)


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
