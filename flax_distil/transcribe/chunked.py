"""Long audio in overlapping chunks, decoded in batches and merged where they overlap.

The paper's algorithm (section 6.2): the larger the batch the faster, and no timestamps are needed.
Where the model predicts timestamps, they divide the text into segments, and the rest of a chunk
after its last one is decoded again: a second pass finds what the first left out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.audio.log_mel import HOP
from flax_distil.decode.hypothesis import Acceptance, Hypothesis, Window
from flax_distil.decode.recognizer import (
    Recognizer,
    decode,
    encode_audio,
    likeliest_languages,
    pad_batch,
)
from flax_distil.options import ChunkedOptions, DecodeOptions
from flax_distil.text.wer import compression_ratio
from flax_distil.transcribe.features import clip_mel, pad_window
from flax_distil.transcribe.merging import (
    ChunkSpan,
    Piece,
    concatenate,
    cut_chunks,
    merge,
    merge_timed,
)
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.segments import FRAMES_PER_STEP, split_segments


class Chunk(NamedTuple):
    """A piece of a recording that has `pieces` of them. start: its window's language and prompt."""

    recording: int
    pieces: int
    piece: Piece
    samples: Float32[np.ndarray, "n"]
    start: Window


@dataclass(eq=False)
class ChunkState:
    """How far a chunk has been decoded."""

    chunk: Chunk
    seek: int = 0  # frames
    mel_TM: Float32[np.ndarray, "T M"] | None = None
    tokens: list[int] = field(default_factory=list)  # timestamps are from the chunk's start
    hypotheses: list[Hypothesis] = field(default_factory=list)  # by window

    @property
    def frames(self) -> int:
        """Of the chunk."""
        return -(-self.chunk.samples.size // HOP)

    @property
    def window(self) -> Window:
        """What the next window is decoded with."""
        start = self.chunk.start
        return replace(start, seed=start.seed + self.chunk.piece.start + self.seek * HOP)

    def next_mel(self, mels: int) -> Float32[np.ndarray, "W M"]:
        """The log-mel of the next window."""
        if self.mel_TM is None:
            self.mel_TM = clip_mel(pad_or_trim(self.chunk.samples), mels)
        # Behind the chunk: silence in its first window, as in Transformers, nothing in the others.
        size = self.frames - self.seek if self.seek else len(self.mel_TM)
        return pad_window(self.mel_TM, self.seek, size)

    def unfinished(self) -> bool:
        """Whether any sound is left that is not farther from a neighbour's edges.

        Digital silence does not count.
        """
        piece = self.chunk.piece
        return bool(self.chunk.samples[self.seek * HOP : piece.last - piece.start].any())

    def add(self, hypothesis: Hypothesis, times: range | None) -> None:
        """Adds a window's text; without timestamps (None) the chunk is complete."""
        self.hypotheses.append(hypothesis)
        if times is None:
            self.tokens, self.seek = list(hypothesis.tokens), self.frames
            return
        spans, moved = split_segments(hypothesis.tokens, times, self.frames - self.seek)
        later, longest = self.seek // FRAMES_PER_STEP, self.frames // FRAMES_PER_STEP
        self.seek += moved
        # The rest is decoded again, or overlaps the next chunk's text.
        unfinished = self.unfinished()
        ids = [token for *_, ids in spans for token in ids] if unfinished else hypothesis.tokens
        self.tokens += [
            min(token + later, times.start + longest) if token in times else token for token in ids
        ]

    def hypothesis(self, recognizer: Recognizer) -> Hypothesis:
        """All windows as one."""
        windows = self.hypotheses
        if not windows:
            return Hypothesis((), "", self.chunk.start.language or "en", 0.0, 1.0, 1.0)
        text = recognizer.tokens.decode(self.tokens).strip()
        return replace(
            windows[0],
            tokens=tuple(self.tokens),
            text=text,
            mean_log_probability=float(
                np.average(
                    [one.mean_log_probability for one in windows],
                    weights=[len(one.tokens) + 1 for one in windows],
                )
            ),
            compression_ratio=compression_ratio(text),
            acceptance=Acceptance.total(one.acceptance for one in windows),
            ended=all(one.ended for one in windows),
        )


def transcribe_in_chunks(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "_"]],
    options: DecodeOptions,
    chunked: ChunkedOptions,
    start: Window,
    batch_size: int = 8,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    A segment is the text of one chunk, or of the time between two timestamps where `options` ask
    for them. Chunks of several recordings share a batch.

    start: what all windows have in common (`prepare`); its language is detected where it is None.
    """
    chunks = map(ChunkState, cut_all(recognizer, waveforms, start, chunked))
    left: list[ChunkState] = []
    parts: dict[int, list[tuple[Piece, Hypothesis]]] = {}  # of the recordings not complete
    acceptance: Acceptance | None = None
    while states := left + list(islice(chunks, batch_size - len(left))):
        if left := [one for one in states if one.unfinished()]:
            drafted = decode_chunks(recognizer, left, options, acceptance)
            acceptance = Acceptance.total((acceptance, drafted))
        left = [one for one in left if one.unfinished()]
        for one in states:
            if one in left:
                continue
            chunk, transcript = one.chunk, None
            known = parts.setdefault(chunk.recording, [])
            known.append((chunk.piece, one.hypothesis(recognizer)))
            if len(known) == chunk.pieces:
                transcript = assemble(recognizer, parts.pop(chunk.recording), options.timestamps)
            seconds = (chunk.piece.last - chunk.piece.first) / SAMPLE_RATE
            yield chunk.recording, seconds, transcript


def decode_chunks(
    recognizer: Recognizer,
    states: Sequence[ChunkState],
    options: DecodeOptions,
    acceptance: Acceptance | None = None,
) -> Acceptance | None:
    """Adds the next window of each chunk; returns what became of the draft tokens.

    acceptance: of the draft tokens so far, which decides whether the assistant pays.
    """
    if options.timestamps:  # a chunk may be continued, from its log-mel
        sounds = [one.next_mel(recognizer.spec.dims.mels) for one in states]
    else:
        sounds = [pad_or_trim(one.chunk.samples) for one in states]
    assistant = recognizer.assistant
    drafting = assistant is not None and assistant.pays(acceptance)
    encoded = encode_audio(recognizer, pad_batch(np.stack(sounds)), drafting=drafting)
    hypotheses = decode(recognizer, encoded, options, [one.window for one in states])
    times = recognizer.tokens.times if options.timestamps else None
    for one, hypothesis in zip(states, hypotheses, strict=True):
        one.add(hypothesis, times)
    return Acceptance.total(one.acceptance for one in hypotheses)


def cut_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "_"]],
    start: Window,
    chunked: ChunkedOptions,
) -> Iterator[Chunk]:
    """The chunks of all recordings; the language is that of `start` or of each one's first 30 s."""
    for recording, waveform in enumerate(waveforms):
        first = start
        if start.language is None:
            language = "en"
            if recognizer.tokens.multilingual:
                states = encode_audio(recognizer, pad_or_trim(waveform)[None], drafting=False)
                language = likeliest_languages(recognizer, states.model_BSD)[0]
            first = replace(start, language=language)
        pieces = cut_chunks(waveform.size, chunked)
        for piece in pieces:
            samples = waveform[piece.start : piece.stop]
            yield Chunk(recording, len(pieces), piece, samples, first)


def assemble(
    recognizer: Recognizer, parts: Sequence[tuple[Piece, Hypothesis]], timestamps: bool
) -> Transcript:
    """The transcript of a recording's chunks, in any order."""
    tokens = recognizer.tokens
    parts = sorted(parts, key=lambda part: part[0].start)
    pieces, texts = [piece for piece, _ in parts], [one.tokens for _, one in parts]
    if timestamps:
        spans = merge_timed(texts, pieces, tokens.times)
    else:
        merged = zip(pieces, merge(texts), strict=True)
        spans = [
            ChunkSpan(place, piece.first / SAMPLE_RATE, piece.last / SAMPLE_RATE, ids)
            for place, (piece, ids) in enumerate(merged)
            if ids
        ]
    segments = []
    for span in spans:
        piece, hypothesis = parts[span.chunk]
        segments.append(
            Segment(
                id=len(segments),
                seek=piece.start // HOP,
                start=span.start,
                end=span.end,
                text=tokens.decode(span.tokens),
                tokens=span.tokens,
                temperature=hypothesis.temperature,
                avg_logprob=hypothesis.mean_log_probability,
                compression_ratio=hypothesis.compression_ratio,
                no_speech_prob=hypothesis.no_speech_probability,
            )
        )
    text = tokens.decode(concatenate([span.tokens for span in spans]))
    acceptance = Acceptance.total(one.acceptance for _, one in parts)
    return Transcript(text, tuple(segments), parts[0][1].language, acceptance)
