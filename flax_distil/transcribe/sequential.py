"""Long audio the way Whisper does it (Radford et al. 2022, section 4.5).

A window of 30 s is decoded with timestamps, the next one begins where the last whole segment ended,
and it is told what was said before. What looks wrong (it repeats itself, or the model doubts it) is
decoded again at higher temperatures; what is silent is passed over. Several recordings advance
together, one window each, in one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32

from flax_distil.audio.load import SAMPLE_RATE, pad_or_trim
from flax_distil.audio.log_mel import HOP
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import Acceptance, DecodeOptions, Hypothesis, total
from flax_distil.decode.recognizer import (
    Recognizer,
    Window,
    batch_bucket,
    check_memory,
    detect,
    drafter_hears,
    pad_batch,
    prepare,
    room_before,
)
from flax_distil.model.dims import CHUNK_FRAMES, CHUNK_SECONDS
from flax_distil.text.tokens import WhisperTokens
from flax_distil.transcribe.fallback import decode_with_fallback
from flax_distil.transcribe.features import clip_mel, encode_mel, recording_mel, window
from flax_distil.transcribe.options import SequentialOptions
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.silence import drop_made_up
from flax_distil.transcribe.words import Span, word_timestamps

FRAME_RATE = SAMPLE_RATE // HOP  # 100 a second
FRAMES_PER_STEP = 2  # a timestamp token stands for 0.02 s
FORGET_ABOVE = 0.5  # a text drawn at a higher temperature is not told to the next window


class Part(NamedTuple):
    """What was heard in one window.

    moved: frames to the next one. closed: nothing follows its text. passed_over: nothing is said,
    or it is to be heard again.
    """

    segments: list[Segment]
    moved: int
    closed: bool
    passed_over: bool = False


@dataclass
class Reading:
    """How far one recording has been read."""

    mel: Float32[np.ndarray, "T M"]
    clips: list[tuple[int, int]]  # in frames
    language: str | None
    prompt: tuple[int, ...]
    seek: int = 0
    size: int = 0  # frames of the window that is being decoded
    written: list[int] = field(default_factory=list)  # the prompt, tokens of all segments
    forgotten: int = 0  # how many of `written` the next window is not told
    segments: list[Segment] = field(default_factory=list)
    last_speech: float = 0.0  # seconds at which the last word ended
    acceptance: Acceptance | None = None
    unaided: int = 0  # windows until an assistant is asked again
    pause: int = 0  # how many they were the last time
    told: int = 0  # frames that the caller knows to be read
    fresh: bool = True  # whether its first window is to be decoded

    @property
    def offset(self) -> float:
        """Seconds at which the window begins."""
        return self.seek / FRAME_RATE

    def open(self) -> bool:
        """Moves to the next window; False at the end.

        Beyond Whisper, nothing is heard where all frames lie on the floor, 80 dB below the loudest.
        """
        while self.clips:
            start, end = self.clips[0]
            self.seek = max(self.seek, start)
            self.size = min(CHUNK_FRAMES, len(self.mel) - self.seek, end - self.seek)
            if self.size <= 0:
                self.clips.pop(0)
                # A timestamp may lie behind the clip, where nothing was heard.
                self.seek = self.clips[0][0] if self.clips else self.seek
            elif np.ptp(self.mel[self.seek : self.seek + self.size]) == 0:
                self.seek += self.size
            else:
                return True
        return False

    def count(self, acceptance: Acceptance | None, break_even: float) -> None:
        """Adds a window's guesses; after poor ones the next 1, 3, 7 … windows do without."""
        self.acceptance = total((self.acceptance, acceptance))
        if acceptance is None:
            self.unaided = max(self.unaided - 1, 0)
        else:
            poor = acceptance.rate < break_even
            self.unaided = self.pause = 2 * self.pause + 1 if poor else 0

    def tell(self, frames: int) -> float:
        """Seconds of the first `frames` that the caller does not know of yet."""
        seconds, self.told = (frames - self.told) / FRAME_RATE, frames
        return seconds

    def transcript(self, recognizer: Recognizer) -> Transcript:
        """What has been read."""
        text = recognizer.tokens.decode(self.written[len(self.prompt) :])
        return Transcript(text, tuple(self.segments), self.language or "en", self.acceptance)


def transcribe_sequentially(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions,
    sequential: SequentialOptions,
    batch_size: int = 8,
    assistant: Assistant | None = None,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    At most `batch_size` recordings are held at a time; when one is read to its end the next begins.
    The assistant drafts at temperature 0, so that it changes no text.

    Raises:
        InputError: the model lacks the language or task, the device the memory, or the assistant
            cannot help this search.
    """
    options = replace(options, timestamps=True, temperature=max(sequential.temperatures))
    check_memory(recognizer, batch_bucket(batch_size), options)
    options = replace(options, temperature=0)
    known, prompt = prepare(recognizer, options, batch_size, assistant)
    waiting = enumerate(waveforms)
    reading: dict[int, Reading] = {}
    while True:
        for number, waveform in islice(waiting, batch_size - len(reading)):
            reading[number] = begin(recognizer, waveform, known, prompt, sequential)
        for number in [number for number, one in reading.items() if not one.open()]:
            one = reading.pop(number)
            yield number, one.tell(len(one.mel)), one.transcript(recognizer)
        if not reading:
            if (following := next(waiting, None)) is None:
                return
            reading[following[0]] = begin(recognizer, following[1], known, prompt, sequential)
            continue
        # As in faster-whisper, only the first window begins with the prefix.
        first = [one for one in reading.values() if one.fresh and options.prefix]
        later = [one for one in reading.values() if not (one.fresh and options.prefix)]
        for some, prefix in ((first, options.prefix), (later, None)):
            if some:
                advance(recognizer, some, replace(options, prefix=prefix), sequential, assistant)
        for number, one in reading.items():
            yield number, one.tell(min(one.seek, len(one.mel))), None


def begin(
    recognizer: Recognizer,
    waveform: Float32[np.ndarray, "n"],
    language: str | None,
    prompt: tuple[int, ...],
    sequential: SequentialOptions,
) -> Reading:
    """A recording of which nothing is read yet; its language is detected from the first 30 s."""
    mel_TM = recording_mel(waveform, recognizer.spec.dims.mels)
    if language is None and len(mel_TM) and recognizer.tokens.multilingual:
        # As in openai-whisper silence follows a short recording, zeros follow a window.
        short = len(mel_TM) < CHUNK_FRAMES
        first_TM = (
            clip_mel(pad_or_trim(waveform), mel_TM.shape[1]) if short else mel_TM[:CHUNK_FRAMES]
        )
        encoder = recognizer.params["encoder"]
        language = detect(recognizer, encode_mel(recognizer.spec, encoder, first_TM[None]))[0]
    points = [round(second * FRAME_RATE) for second in sequential.clips] or [0]
    points += [len(mel_TM)] * (len(points) % 2)
    clips = list(zip(points[::2], points[1::2], strict=True))
    return Reading(mel_TM, clips, language, prompt, written=list(prompt))


def advance(
    recognizer: Recognizer,
    reading: Sequence[Reading],
    options: DecodeOptions,
    sequential: SequentialOptions,
    assistant: Assistant | None,
) -> None:
    """Reads one window of each recording; the assistant is asked where any still wants it."""
    if all(one.unaided for one in reading):
        assistant = None
    mel_BTM = pad_batch(np.stack([window(one.mel, one.seek, one.size) for one in reading]))
    audio_BSD = encode_mel(recognizer.spec, recognizer.params["encoder"], mel_BTM)
    windows = [
        Window(
            one.language or "en",
            before(one, recognizer, options, sequential),
            seed=options.seed + one.seek,
        )
        for one in reading
    ]
    heard_BSE = drafter_hears(assistant, windows, encode_mel, mel_BTM)
    found = decode_with_fallback(
        recognizer, audio_BSD, options, windows, sequential, assistant, heard_BSE
    )
    parts = [
        segments_of(one, hypothesis, recognizer.tokens, sequential)
        for one, hypothesis in zip(reading, found, strict=True)
    ]
    if sequential.word_timestamps:
        parts = with_words(recognizer, audio_BSD, reading, parts, options.task, sequential)
    for one, part, hypothesis in zip(reading, parts, found, strict=True):
        one.count(hypothesis.acceptance, assistant.break_even if assistant else 0)
        take(one, part)
        one.fresh = False
        hot = hypothesis.temperature > FORGET_ABOVE
        told = sequential.condition_on_previous_text and recognizer.previous_text
        if not part.passed_over and (hot or not told):
            one.forgotten = len(one.written)


def before(
    reading: Reading,
    recognizer: Recognizer,
    options: DecodeOptions,
    sequential: SequentialOptions,
) -> tuple[int, ...]:
    """What the next window is told of the text before it."""
    if not sequential.carry_prompt:
        return tuple(reading.written[reading.forgotten :])
    said = tuple(reading.written[max(reading.forgotten, len(reading.prompt)) :])
    # What is too much would be cut off from the left, where the prompt is.
    room = room_before(recognizer, options) - len(reading.prompt)
    return reading.prompt + (said[-room:] if room > 0 else ())


def segments_of(
    reading: Reading, found: Hypothesis, tokens: WhisperTokens, sequential: SequentialOptions
) -> Part:
    """The segments of a window; none where it is silent."""
    silence, doubt = sequential.no_speech_threshold, sequential.logprob_threshold
    if silence is not None and found.no_speech_probability > silence:
        sure = doubt is not None and found.mean_log_probability > doubt
        if not sure:
            return Part([], reading.size, True, True)
    spans, moved = split(found.tokens, tokens.times, reading.size)
    segments = [
        Segment(
            id=len(reading.segments) + index,
            seek=reading.seek,
            start=(reading.seek + FRAMES_PER_STEP * start) / FRAME_RATE,
            end=(reading.seek + FRAMES_PER_STEP * end) / FRAME_RATE,
            text=tokens.decode(ids),
            tokens=ids,
            temperature=found.temperature,
            avg_logprob=found.mean_log_probability,
            compression_ratio=found.compression_ratio,
            no_speech_prob=found.no_speech_probability,
        )
        for index, (start, end, ids) in enumerate(spans)
    ]
    return Part(segments, moved, ends_alone(found.tokens, tokens.times))


def with_words(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    reading: Sequence[Reading],
    parts: Sequence[Part],
    task: str,
    sequential: SequentialOptions,
) -> list[Part]:
    """Segments with words and the words' times; an unfinished window ends with its last word."""
    timed = word_timestamps(
        recognizer,
        audio_BSD,
        [[Span(one.tokens, one.start, one.end) for one in part.segments] for part in parts],
        [one.language or "en" for one in reading],
        task,
        [one.size for one in reading],
        [one.offset for one in reading],
        [one.last_speech for one in reading],
    )
    known = []
    for one, part, times in zip(reading, parts, timed, strict=True):
        segments = [
            replace(segment, start=time.start, end=time.end, words=time.words)
            for segment, time in zip(part.segments, times, strict=True)
        ]
        part = part._replace(segments=segments)
        if segments:
            part = moved_on(one, part, sequential.hallucination_silence_threshold)
            one.last_speech = last_word(part.segments, one.last_speech)
        known.append(part)
    return known


def moved_on(reading: Reading, part: Part, threshold: float | None) -> Part:
    """A window with words, and the next one where the words say."""
    start, spoken = reading.offset, last_word(part.segments, reading.last_speech)
    frames_to = lambda second: max(round(second * FRAME_RATE) - reading.seek, 1)
    if not part.closed and spoken > start:
        more = threshold is None or start + CHUNK_SECONDS - spoken > threshold
        part = part._replace(moved=frames_to(spoken) if more else reading.size)
    if threshold is None:
        return part
    end, whole = start + reading.size / FRAME_RATE, len(reading.mel) / FRAME_RATE
    segments, go_on, is_read = drop_made_up(
        part.segments, threshold, start, end, whole, reading.last_speech
    )
    moved = part.moved if go_on is None else frames_to(go_on)
    return Part(segments, moved, part.closed, not is_read)


def last_word(segments: Sequence[Segment], before: float) -> float:
    """Seconds at which the last word ended."""
    words = [word for segment in segments for word in segment.words or ()]
    return words[-1].end if words else segments[-1].end if segments else before


def take(reading: Reading, part: Part) -> None:
    """Adds a window's segments to what is read and moves on to where the next window begins."""
    for segment in part.segments:
        if segment.start == segment.end or not segment.text.strip():
            words = None if segment.words is None else ()
            segment = replace(segment, text="", tokens=(), words=words)
        reading.segments.append(segment)
        reading.written += segment.tokens
    reading.seek += part.moved


def split(
    ids: Sequence[int], times: range, size: int
) -> tuple[list[tuple[float, float, tuple[int, ...]]], int]:
    """The segments of a window of `size` frames, as (start, end, tokens), and frames to move on.

    Start and end are in timestamp steps of two frames. A segment ends between two timestamps in a
    row. What follows the last pair is unfinished, and is heard again, unless it ends on a timestamp
    of its own: then nothing is said behind it.
    """
    ids = tuple(ids)
    stamped = [token in times for token in ids]
    cuts = [at for at in range(1, len(ids)) if stamped[at - 1] and stamped[at]]
    closed = ends_alone(ids, times)
    if not cuts:
        last = max((at for at, is_time in enumerate(stamped) if is_time), default=None)
        end = size / FRAMES_PER_STEP
        if last is not None and ids[last] != times.start:
            end = ids[last] - times.start
        return [(0.0, float(end), ids)], size
    cuts += [len(ids)] * closed
    parts = [ids[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]
    step = lambda token: float(token - times.start)
    spans = [(step(part[0]), step(part[-1]), part) for part in parts]
    return spans, size if closed else FRAMES_PER_STEP * int(spans[-1][1])


def ends_alone(ids: Sequence[int], times: range) -> bool:
    """Whether the last token is a timestamp and the one before it is not."""
    return [token in times for token in ids[-2:]] == [False, True]
