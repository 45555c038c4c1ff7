"""The text of a window, with timestamps, as segments of its recording (openai-whisper's rules)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from flax_distil.audio.load import SAMPLE_RATE
from flax_distil.audio.log_mel import HOP
from flax_distil.decode.hypothesis import Hypothesis
from flax_distil.model.dims import CHUNK_SECONDS
from flax_distil.options import SequentialOptions
from flax_distil.text.tokens import WhisperTokens
from flax_distil.transcribe.result import Segment
from flax_distil.transcribe.silence import drop_hallucinations
from flax_distil.transcribe.words import TimedSpan

FRAME_RATE = SAMPLE_RATE // HOP  # 100 a second
FRAMES_PER_STEP = 2  # timestamp tokens are 0.02 s apart


class WindowResult(NamedTuple):
    """The segments of one window.

    moved: frames to the next window. closed: there is no text after the last segment. skipped: the
    window is silent, or will be decoded again.
    """

    segments: list[Segment]
    moved: int
    closed: bool
    skipped: bool = False


class Place(NamedTuple):
    """A window's place in its recording.

    seek, size: its first frame and its number of frames. frames: of the recording. segments: number
    of those before it. last_speech: seconds at which the last word before it ended.
    """

    seek: int
    size: int
    frames: int
    segments: int
    last_speech: float

    @property
    def start(self) -> float:
        """Seconds at which the window begins."""
        return self.seek / FRAME_RATE


def segments_of(
    place: Place, hypothesis: Hypothesis, tokens: WhisperTokens, sequential: SequentialOptions
) -> WindowResult:
    """The segments of a window; none where it is silent."""
    silence, doubt = sequential.no_speech_threshold, sequential.logprob_threshold
    if silence is not None and hypothesis.no_speech_probability > silence:
        sure = doubt is not None and hypothesis.mean_log_probability > doubt
        if not sure:
            return WindowResult([], place.size, closed=True, skipped=True)
    spans, moved = split_segments(hypothesis.tokens, tokens.times, place.size)
    segments = [
        Segment(
            id=place.segments + index,
            seek=place.seek,
            start=(place.seek + FRAMES_PER_STEP * start) / FRAME_RATE,
            end=(place.seek + FRAMES_PER_STEP * end) / FRAME_RATE,
            text=tokens.decode(ids),
            tokens=ids,
            temperature=hypothesis.temperature,
            avg_logprob=hypothesis.mean_log_probability,
            compression_ratio=hypothesis.compression_ratio,
            no_speech_prob=hypothesis.no_speech_probability,
        )
        for index, (start, end, ids) in enumerate(spans)
    ]
    return WindowResult(segments, moved, ends_alone(hypothesis.tokens, tokens.times))


def split_segments(
    ids: Sequence[int], times: range, size: int
) -> tuple[list[tuple[float, float, tuple[int, ...]]], int]:
    """The segments of a window of `size` frames, as (start, end, tokens), and frames to move on.

    Start and end are in timestamp steps of two frames. A segment ends between two consecutive
    timestamps. The text after the last pair is unfinished, and is decoded again with the next
    window, unless it ends with a single timestamp: then there is no speech after it.

    times: the ids of timestamps.
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


def with_words(
    place: Place, result: WindowResult, timed: Sequence[TimedSpan], threshold: float | None
) -> WindowResult:
    """Segments with words and the words' times; an unfinished window ends with its last word.

    threshold: seconds of silence beside which improbable text is dropped.
    """
    segments = [
        replace(segment, start=span.start, end=span.end, words=span.words)
        for segment, span in zip(result.segments, timed, strict=True)
    ]
    result = result._replace(segments=segments)
    if not segments:
        return result
    start, spoken = place.start, last_word(segments, place.last_speech)
    frames_to = lambda second: max(round(second * FRAME_RATE) - place.seek, 1)
    if not result.closed and spoken > start:
        more = threshold is None or start + CHUNK_SECONDS - spoken > threshold
        result = result._replace(moved=frames_to(spoken) if more else place.size)
    if threshold is None:
        return result
    end, whole = start + place.size / FRAME_RATE, place.frames / FRAME_RATE
    kept, resume, done = drop_hallucinations(
        segments, threshold, start, end, whole, place.last_speech
    )
    moved = result.moved if resume is None else frames_to(resume)
    return WindowResult(kept, moved, result.closed, skipped=not done)


def last_word(segments: Sequence[Segment], before: float) -> float:
    """Seconds at which the last word ended."""
    words = [word for segment in segments for word in segment.words or ()]
    return words[-1].end if words else segments[-1].end if segments else before
