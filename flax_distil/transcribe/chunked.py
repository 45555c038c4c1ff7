"""Long audio in overlapping chunks, all of them decoded in batches, merged where they overlap.

The paper's algorithm (section 6.2): as fast as the batch is large, and no timestamps are needed.
Where the model was taught some, they cut the text into segments, and a chunk is read on from its
last one: what a first pass leaves out is found by the next.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.audio.log_mel import HOP
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import DecodeOptions, Hypothesis, total
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
from flax_distil.text.wer import compression_ratio
from flax_distil.transcribe.features import clip_mel, encode_mel, window
from flax_distil.transcribe.merging import Piece, Span, cut, flat, merge, merge_timed
from flax_distil.transcribe.options import ChunkedOptions
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.sequential import FRAMES_PER_STEP, split


class Chunk(NamedTuple):
    """A piece of a recording that has `pieces` of them."""

    recording: int
    pieces: int
    piece: Piece
    samples: Float32[np.ndarray, "n"]
    language: str


@dataclass(eq=False)
class Reading:
    """How far a chunk has been read."""

    chunk: Chunk
    seek: int = 0  # frames
    mel_TM: Float32[np.ndarray, "T M"] | None = None
    tokens: list[int] = field(default_factory=list)  # timestamps are from the chunk's start
    heard: list[Hypothesis] = field(default_factory=list)  # by window

    @property
    def frames(self) -> int:
        """Of the chunk."""
        return -(-self.chunk.samples.size // HOP)

    @property
    def at(self) -> int:
        """Samples from the recording's start to what is read next."""
        return self.chunk.piece.start + self.seek * HOP

    def mel_ahead(self, mels: int) -> Float32[np.ndarray, "T M"]:
        """The log-mel window that is read next."""
        if self.mel_TM is None:
            self.mel_TM = clip_mel(pad_or_trim(self.chunk.samples), mels)
        # Behind the chunk: silence in its first window, as in Transformers, nothing in the others.
        size = self.frames - self.seek if self.seek else len(self.mel_TM)
        return window(self.mel_TM, self.seek, size)

    def unread(self) -> bool:
        """Whether any sound is left that no neighbour hears better.

        Where there is none at all, no text would be believed.
        """
        piece = self.chunk.piece
        return bool(self.chunk.samples[self.seek * HOP : piece.last - piece.start].any())

    def take(self, found: Hypothesis, times: range | None) -> None:
        """Adds what was heard in a window; without timestamps (None) nothing is read on."""
        self.heard.append(found)
        if times is None:
            self.tokens, self.seek = list(found.tokens), self.frames
            return
        spans, moved = split(found.tokens, times, self.frames - self.seek)
        later, longest = self.seek // FRAMES_PER_STEP, self.frames // FRAMES_PER_STEP
        self.seek += moved
        # What is unfinished is heard again, or laid over what the next chunk hears of it.
        ids = [token for *_, ids in spans for token in ids] if self.unread() else found.tokens
        self.tokens += [
            min(token + later, times.start + longest) if token in times else token for token in ids
        ]

    def hypothesis(self, recognizer: Recognizer) -> Hypothesis:
        """All windows as one."""
        if not self.heard:
            return Hypothesis((), "", self.chunk.language, 0.0, 1.0, 1.0)
        text = recognizer.tokens.decode(self.tokens).strip()
        return replace(
            self.heard[0],
            tokens=tuple(self.tokens),
            text=text,
            mean_log_probability=float(
                np.average(
                    [one.mean_log_probability for one in self.heard],
                    weights=[len(one.tokens) + 1 for one in self.heard],
                )
            ),
            compression_ratio=compression_ratio(text),
            acceptance=total(one.acceptance for one in self.heard),
            ended=all(one.ended for one in self.heard),
        )


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
    chunks = map(Reading, cut_all(recognizer, waveforms, known, chunked))
    unread: list[Reading] = []
    heard: dict[int, list[tuple[Piece, Hypothesis]]] = {}  # of the recordings not complete
    while reading := unread + list(islice(chunks, batch_size - len(unread))):
        if unread := [one for one in reading if one.unread()]:
            hear(recognizer, unread, options, previous, assistant)
        unread = [one for one in unread if one.unread()]
        for one in reading:
            if one in unread:
                continue
            chunk, transcript = one.chunk, None
            known_parts = heard.setdefault(chunk.recording, [])
            known_parts.append((chunk.piece, one.hypothesis(recognizer)))
            if len(known_parts) == chunk.pieces:
                transcript = assemble(recognizer, heard.pop(chunk.recording), options.timestamps)
            seconds = (chunk.piece.last - chunk.piece.first) / SAMPLE_RATE
            yield chunk.recording, seconds, transcript


def hear(
    recognizer: Recognizer,
    reading: Sequence[Reading],
    options: DecodeOptions,
    previous: tuple[int, ...],
    assistant: Assistant | None,
) -> None:
    """Reads the next window of each chunk."""
    windows = [
        Window(one.chunk.language, previous, options.temperature, options.seed + one.at)
        for one in reading
    ]
    if options.timestamps:  # a chunk may be read on, from its log-mel
        encoder, mels = encode_mel, recognizer.spec.dims.mels
        sounds = [one.mel_ahead(mels) for one in reading]
    else:
        encoder, sounds = encode, [pad_or_trim(one.chunk.samples) for one in reading]
    sound = pad_batch(np.stack(sounds))
    audio_BSD = encoder(recognizer.spec, recognizer.params["encoder"], sound)
    heard_BSE = drafter_hears(assistant, windows, encoder, sound)
    found = decode(recognizer, audio_BSD, options, windows, assistant, heard_BSE)
    times = recognizer.tokens.times if options.timestamps else None
    for one, hypothesis in zip(reading, found, strict=True):
        one.take(hypothesis, times)


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
        for piece in pieces:
            samples = waveform[piece.start : piece.stop]
            yield Chunk(recording, len(pieces), piece, samples, language)


def language_of(recognizer: Recognizer, waveform: Float32[np.ndarray, "n"]) -> str:
    """The code of the language of the first 30 s."""
    if not recognizer.tokens.multilingual:
        return "en"
    first = pad_or_trim(waveform)[None]
    return detect(recognizer, encode(recognizer.spec, recognizer.params["encoder"], first))[0]


def assemble(
    recognizer: Recognizer, heard: Sequence[tuple[Piece, Hypothesis]], timestamps: bool
) -> Transcript:
    """The transcript of a recording's chunks, which may have been read in any order."""
    tokens = recognizer.tokens
    heard = sorted(heard, key=lambda one: one[0].start)
    pieces, texts = [piece for piece, _ in heard], [found.tokens for _, found in heard]
    if timestamps:
        spans = merge_timed(texts, pieces, tokens.times)
    else:
        parts = zip(pieces, merge(texts), strict=True)
        spans = [
            Span(place, piece.first / SAMPLE_RATE, piece.last / SAMPLE_RATE, part)
            for place, (piece, part) in enumerate(parts)
            if part
        ]
    segments = []
    for span in spans:
        piece, found = heard[span.chunk]
        segments.append(
            Segment(
                id=len(segments),
                seek=piece.start // HOP,
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
    acceptance = total(found.acceptance for _, found in heard)
    return Transcript(text, tuple(segments), heard[0][1].language, acceptance)
