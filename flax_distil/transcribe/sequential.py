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

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.audio.log_mel import HOP
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
    text_ids,
)
from flax_distil.errors import InputError
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.text.tokens import WhisperTokens
from flax_distil.transcribe.features import listen_to_mel, recording_mel, window
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.words import Span, word_timestamps

FRAME_RATE = SAMPLE_RATE // HOP  # 100 a second
FRAMES_PER_STEP = 2  # a timestamp token stands for 0.02 s
FORGET_ABOVE = 0.5  # a text drawn at a higher temperature is not told to the next window


@dataclass(frozen=True)
class SequentialOptions:
    """Whisper's thresholds; the defaults are its own."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Tried in turn until a text looks right; the last one's text is taken as it is."""
    compression_ratio_threshold: float | None = 2.4
    """A text that compresses further repeats itself."""
    logprob_threshold: float | None = -1.0
    """The model doubts a text whose tokens have a lower mean log-probability."""
    no_speech_threshold: float | None = 0.6
    """A window whose no-speech token is more probable is silent, if the model doubts its text."""
    condition_on_previous_text: bool = True
    """Tell each window what was said before it."""
    carry_prompt: bool = False
    """Tell every window the prompt, not only the first."""
    clips: tuple[float, ...] = ()
    """Start, end, start, … of the parts to transcribe, in seconds; without it, all."""
    word_timestamps: bool = False
    """Say when each word is spoken; the next window then begins behind the last word."""

    def __post_init__(self):
        if not self.temperatures or min(self.temperatures) < 0:
            raise InputError(f"temperatures are {self.temperatures}: give some, none below 0")
        if list(self.clips) != sorted(self.clips) or min(self.clips, default=0) < 0:
            raise InputError(
                f"clips are {self.clips}: give start, end, start, … in seconds, none before another"
            )


class Part(NamedTuple):
    """What was heard in one window. moved: frames to the next one. closed: nothing follows it."""

    segments: list[Segment]
    moved: int
    closed: bool


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

    @property
    def offset(self) -> float:
        """Seconds at which the window begins."""
        return self.seek / FRAME_RATE

    def open(self) -> bool:
        """Moves to the next window; False at the end."""
        while self.clips:
            start, end = self.clips[0]
            self.seek = max(self.seek, start)
            self.size = min(CHUNK_FRAMES, len(self.mel) - self.seek, end - self.seek)
            if self.size > 0:
                return True
            self.clips.pop(0)
        return False

    def transcript(self, recognizer: Recognizer) -> Transcript:
        """What has been read."""
        text = recognizer.tokens.decode(self.written[len(self.prompt) :])
        return Transcript(text, tuple(self.segments), self.language or "en")


def transcribe_sequentially(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions,
    sequential: SequentialOptions,
    batch_size: int = 8,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    At most `batch_size` recordings are held at a time; when one is read to its end the next begins.

    Raises:
        InputError: the model lacks the language or task, or the device the memory.
    """
    options = replace(options, timestamps=True)
    check_memory(recognizer.spec, bucket(batch_size), options)
    known = checked_language(recognizer, options)
    prompt = text_ids(recognizer.tokens, options.prompt)
    waiting = enumerate(waveforms)
    reading: dict[int, Reading] = {}
    while True:
        for number, waveform in islice(waiting, batch_size - len(reading)):
            reading[number] = begin(recognizer, waveform, known, prompt, sequential)
        for number in [number for number, one in reading.items() if not one.open()]:
            yield number, 0.0, reading.pop(number).transcript(recognizer)
        if not reading:
            if (following := next(waiting, None)) is None:
                return
            reading[following[0]] = begin(recognizer, following[1], known, prompt, sequential)
            continue
        places = {number: one.seek for number, one in reading.items()}
        advance(recognizer, list(reading.values()), options, sequential)
        for number, place in places.items():
            reached = min(reading[number].seek, len(reading[number].mel))
            yield number, (reached - place) / FRAME_RATE, None


def begin(
    recognizer: Recognizer,
    waveform: Float32[np.ndarray, "n"],
    language: str | None,
    prompt: tuple[int, ...],
    sequential: SequentialOptions,
) -> Reading:
    """A recording of which nothing is read yet; its language is detected from the first 30 s."""
    mel_TM = recording_mel(waveform, recognizer.spec.dims.mels)
    if language is None and len(mel_TM):
        language = detect(recognizer, hear(recognizer, [window(mel_TM, 0, CHUNK_FRAMES)]))[0]
    points = [round(second * FRAME_RATE) for second in sequential.clips] or [0]
    points += [len(mel_TM)] * (len(points) % 2)
    clips = list(zip(points[::2], points[1::2], strict=True))
    return Reading(mel_TM, clips, language, prompt, written=list(prompt))


def hear(recognizer: Recognizer, windows: Sequence[np.ndarray]) -> Float[Array, "B S D"]:
    """Audio states of some windows, filled up to a power of two."""
    mel_BTM = fill(np.stack(windows))
    return listen_to_mel(recognizer.spec, recognizer.params["encoder"], mel_BTM)


def advance(
    recognizer: Recognizer,
    reading: Sequence[Reading],
    options: DecodeOptions,
    sequential: SequentialOptions,
) -> None:
    """Reads one window of each recording."""
    audio_BSD = hear(recognizer, [window(one.mel, one.seek, one.size) for one in reading])
    windows = [
        Window(
            one.language or "en", before(one, recognizer, sequential), 0, options.seed + one.seek
        )
        for one in reading
    ]
    found = decode_with_fallback(recognizer, audio_BSD, options, windows, sequential)
    parts = [
        segments_of(one, hypothesis, recognizer.tokens, sequential)
        for one, hypothesis in zip(reading, found, strict=True)
    ]
    if sequential.word_timestamps:
        parts = with_words(recognizer, audio_BSD, reading, parts, options.task)
    for one, part in zip(reading, parts, strict=True):
        take(one, part)
        hot = bool(part.segments) and part.segments[0].temperature > FORGET_ABOVE
        if part.segments and (hot or not sequential.condition_on_previous_text):
            one.forgotten = len(one.written)


def before(
    reading: Reading, recognizer: Recognizer, sequential: SequentialOptions
) -> tuple[int, ...]:
    """What the next window is told of the text before it."""
    if not sequential.carry_prompt:
        return tuple(reading.written[reading.forgotten :])
    said = tuple(reading.written[max(reading.forgotten, len(reading.prompt)) :])
    room = recognizer.spec.dims.text_positions // 2 - 1 - len(reading.prompt)
    return reading.prompt + (said[-room:] if room > 0 else ())


def decode_with_fallback(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    options: DecodeOptions,
    windows: Sequence[Window],
    sequential: SequentialOptions,
) -> list[Hypothesis]:
    """One hypothesis a window, each at the first temperature at which it looks right."""
    found: dict[int, Hypothesis] = {}
    failed = list(range(len(windows)))
    for temperature in sequential.temperatures:
        again = [replace(windows[row], temperature=temperature) for row in failed]
        chosen_BSD = audio_BSD
        if len(failed) < len(windows):
            rows = failed + failed[:1] * (bucket(len(failed)) - len(failed))
            chosen_BSD = audio_BSD[jnp.array(rows)]
        hypotheses = decode(recognizer, chosen_BSD, options, again)
        found |= dict(zip(failed, hypotheses, strict=True))
        failed = [row for row in failed if looks_wrong(found[row], sequential)]
        if not failed:
            break
    return [found[row] for row in range(len(windows))]


def looks_wrong(found: Hypothesis, sequential: SequentialOptions) -> bool:
    """Whether a text repeats itself or the model doubts it, and it is not silence."""
    ratio, doubt = sequential.compression_ratio_threshold, sequential.logprob_threshold
    doubted = doubt is not None and found.mean_log_probability < doubt
    silent = sequential.no_speech_threshold is not None and (
        found.no_speech_probability > sequential.no_speech_threshold
    )
    if doubted:
        return not silent
    return ratio is not None and found.compression_ratio > ratio


def segments_of(
    reading: Reading, found: Hypothesis, tokens: WhisperTokens, sequential: SequentialOptions
) -> Part:
    """The segments of a window; none where it is silent.

    Beyond Whisper, no text is believed where all frames lie on the floor, 80 dB below the loudest.
    """
    if np.ptp(reading.mel[reading.seek : reading.seek + reading.size]) == 0:
        return Part([], reading.size, True)
    silence, doubt = sequential.no_speech_threshold, sequential.logprob_threshold
    if silence is not None and found.no_speech_probability > silence:
        sure = doubt is not None and found.mean_log_probability > doubt
        if not sure:
            return Part([], reading.size, True)
    spans, moved = split(found.tokens, tokens.timestamp_begin, reading.size)
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
    return Part(segments, moved, ends_alone(found.tokens, tokens.timestamp_begin))


def with_words(
    recognizer: Recognizer,
    audio_BSD: Float[Array, "B S D"],
    reading: Sequence[Reading],
    parts: Sequence[Part],
    task: str,
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
        moved = part.moved
        if segments:
            words = [word for segment in segments for word in segment.words or ()]
            spoken = words[-1].end if words else segments[-1].end
            if not part.closed and spoken > one.offset:
                moved = max(round(spoken * FRAME_RATE) - one.seek, 1)
            one.last_speech = spoken
        known.append(Part(segments, moved, part.closed))
    return known


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
    ids: Sequence[int], timestamp_begin: int, size: int
) -> tuple[list[tuple[float, float, tuple[int, ...]]], int]:
    """The segments of a window of `size` frames, as (start, end, tokens), and frames to move on.

    Start and end are in timestamp steps of two frames. A segment ends between two timestamps in a
    row. What follows the last pair is unfinished, and is heard again, unless it ends on a timestamp
    of its own: then nothing is said behind it.
    """
    ids = tuple(ids)
    stamped = [token >= timestamp_begin for token in ids]
    cuts = [at for at in range(1, len(ids)) if stamped[at - 1] and stamped[at]]
    closed = ends_alone(ids, timestamp_begin)
    if not cuts:
        last = max((at for at, is_time in enumerate(stamped) if is_time), default=None)
        end = size / FRAMES_PER_STEP
        if last is not None and ids[last] != timestamp_begin:
            end = ids[last] - timestamp_begin
        return [(0.0, float(end), ids)], size
    cuts += [len(ids)] * closed
    parts = [ids[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]
    step = lambda token: float(token - timestamp_begin)
    spans = [(step(part[0]), step(part[-1]), part) for part in parts]
    return spans, size if closed else FRAMES_PER_STEP * int(spans[-1][1])


def ends_alone(ids: Sequence[int], timestamp_begin: int) -> bool:
    """Whether the last token is a timestamp and the one before it is not."""
    return [token >= timestamp_begin for token in ids[-2:]] == [False, True]
