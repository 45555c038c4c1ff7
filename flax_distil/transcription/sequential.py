"""Long audio with Whisper's own algorithm (Radford et al. 2022, section 4.5).

A window of 30 s is decoded with timestamps, with the text before it as prompt; the next window
begins where the last whole segment ended. A text that repeats itself or is improbable is decoded
again at higher temperatures; silent windows are skipped. Several recordings advance together, one
window each, in one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_distil.audio.load import pad_or_trim
from flax_distil.decode.prompts import previous_room
from flax_distil.decode.recognizer import (
    AudioStates,
    batch_bucket,
    decode,
    encode_audio,
    likeliest_languages,
    pad_batch,
)
from flax_distil.decode.search import Acceptance, Hypothesis, Window
from flax_distil.model.dims import CHUNK_FRAMES, CHUNK_SECONDS
from flax_distil.options import SequentialOptions
from flax_distil.text.tokens import WhisperTokens
from flax_distil.transcription import long_form
from flax_distil.transcription.long_form import LogMel, LongFormJob, Progress, Samples
from flax_distil.transcription.transcript import Segment, Transcript
from flax_distil.transcription.words import align_words, assign_words, drop_hallucinations

FORGET_ABOVE = 0.5  # a text drawn at a higher temperature is not in the next window's prompt


class WindowResult(NamedTuple):
    """The segments of one window.

    moved: frames to the next window. closed: there is no text after the last segment. skipped: the
    window is silent, or will be decoded again.
    """

    segments: list[Segment]
    moved: int
    closed: bool
    skipped: bool = False


@dataclass
class RecordingState:
    """How far one recording has been transcribed.

    mel: of the recording. clips: first and last frames that are left. start: what all its windows
    have in common.
    """

    mel: LogMel
    clips: list[tuple[int, int]]
    start: Window
    seek: int = 0  # the window's first frame
    size: int = 0  # frames of the window
    tokens: list[int] = field(default_factory=list)  # of the prompt and of all segments
    forgotten: int = 0  # how many of `tokens` are not in the next window's prompt
    segments: list[Segment] = field(default_factory=list)
    last_speech: float = 0.0  # seconds at which the last word ended
    acceptance: Acceptance | None = None
    reported: int = 0  # frames whose progress was reported
    first: bool = True  # whether the window is the first one

    @property
    def second(self) -> float:
        """At which the window begins."""
        return self.seek / long_form.FRAME_RATE

    def next_window(self) -> bool:
        """Moves to the next window; False at the end.

        Unlike in openai-whisper, windows whose frames all lie on the floor, 80 dB below the
        loudest, are skipped.
        """
        while self.clips:
            start, end = self.clips[0]
            self.seek = max(self.seek, start)
            self.size = min(CHUNK_FRAMES, len(self.mel) - self.seek, end - self.seek)
            if self.size <= 0:
                self.clips.pop(0)
                # A timestamp may lie after the clip.
                self.seek = self.clips[0][0] if self.clips else self.seek
            elif np.ptp(self.mel[self.seek : self.seek + self.size]) == 0:
                self.seek += self.size
            else:
                return True
        return False

    def progress(self, frames: int) -> float:
        """Seconds of the first `frames` that were not reported yet."""
        seconds, self.reported = (frames - self.reported) / long_form.FRAME_RATE, frames
        return seconds

    def add(self, result: WindowResult) -> None:
        """Adds a window's segments and moves on to where the next window begins."""
        self.last_speech = last_word(result.segments, self.last_speech)
        for segment in result.segments:
            if segment.start == segment.end or not segment.text.strip():
                words = None if segment.words is None else ()
                segment = replace(segment, text="", tokens=(), words=words)
            self.segments.append(segment)
            self.tokens += segment.tokens
        self.seek += result.moved
        self.first = False


def transcribe_sequentially(job: LongFormJob, waveforms: Iterable[Samples]) -> Iterator[Progress]:
    """Transcribes each recording by windows that begin where the text of the last one ended.

    At most `batch_size` recordings are held at a time; when one is complete the next begins. An
    assistant drafts at temperature 0 only, so that it changes no text.
    """
    waiting = enumerate(waveforms)
    active: dict[int, RecordingState] = {}
    while True:
        for number, waveform in islice(waiting, job.batch_size - len(active)):
            active[number] = begin_recording(job, waveform)
        if not active:
            return
        for number in [number for number, one in active.items() if not one.next_window()]:
            one = active.pop(number)
            text = job.recognizer.tokens.decode(one.tokens[len(one.start.previous) :])
            language = one.start.language or "en"
            transcript = Transcript(text, tuple(one.segments), language, one.acceptance)
            yield number, one.progress(len(one.mel)), transcript
        # As in faster-whisper, only the first window begins with the prefix.
        prefix = job.options.prefix
        first = [one for one in active.values() if one.first and prefix]
        later = [one for one in active.values() if not (one.first and prefix)]
        for some, opening in ((first, prefix), (later, None)):
            if some:
                transcribe_windows(replace(job, options=replace(job.options, prefix=opening)), some)
        for number, one in active.items():
            yield number, one.progress(min(one.seek, len(one.mel))), None


def begin_recording(job: LongFormJob, waveform: Samples) -> RecordingState:
    """The state before the first window; the language is detected from the first 30 s."""
    recognizer, start = job.recognizer, job.start
    mel_TM = long_form.recording_mel(waveform, recognizer.spec.dims.mels)
    if start.language is None and len(mel_TM) and recognizer.tokens.multilingual:
        first_TM = mel_TM[:CHUNK_FRAMES]
        if len(mel_TM) < CHUNK_FRAMES:
            # As in openai-whisper silence follows a short recording, zeros follow a window.
            first_TM = long_form.clip_mel(pad_or_trim(waveform), mel_TM.shape[1])
        states = encode_audio(recognizer, first_TM[None], drafting=False)
        start = replace(start, language=likeliest_languages(recognizer, states.model_BSD)[0])
    points = [round(second * long_form.FRAME_RATE) for second in job.sequential.clips] or [0]
    points += [len(mel_TM)] * (len(points) % 2)
    clips = list(zip(points[::2], points[1::2], strict=True))
    return RecordingState(mel_TM, clips, start, tokens=list(start.previous))


def transcribe_windows(job: LongFormJob, active: Sequence[RecordingState]) -> None:
    """Adds one window of each recording; the assistant is used where it pays for any of them."""
    recognizer, sequential = job.recognizer, job.sequential
    assistant = recognizer.assistant
    drafting = assistant is not None and any(assistant.pays(one.acceptance) for one in active)
    mels = [long_form.pad_window(one.mel, one.seek, one.size) for one in active]
    states = encode_audio(recognizer, pad_batch(np.stack(mels)), drafting=drafting)
    windows = [
        replace(one.start, previous=previous_tokens(job, one), seed=one.start.seed + one.seek)
        for one in active
    ]
    hypotheses = decode_with_fallback(job, states, windows)
    results = [
        segments_of(one, hypothesis, recognizer.tokens, sequential)
        for one, hypothesis in zip(active, hypotheses, strict=True)
    ]
    if sequential.word_timestamps:
        aligned = align_words(
            recognizer,
            states.model_BSD,
            [[token for one in result.segments for token in one.tokens] for result in results],
            [one.start.language or "en" for one in active],
            task=job.options.task,
            frames=[one.size for one in active],
        )
        is_text, threshold = recognizer.tokens.is_text, sequential.hallucination_silence_threshold
        for row, (one, words) in enumerate(zip(active, aligned, strict=True)):
            segments = results[row].segments
            timed = assign_words(words, segments, one.second, one.last_speech, is_text)
            results[row] = with_words(one, results[row]._replace(segments=timed), threshold)
    keep = sequential.condition_on_previous_text and recognizer.previous_text
    for one, result, hypothesis in zip(active, results, hypotheses, strict=True):
        one.acceptance = Acceptance.total((one.acceptance, hypothesis.acceptance))
        one.add(result)
        if not result.skipped and (hypothesis.temperature > FORGET_ABOVE or not keep):
            one.forgotten = len(one.tokens)


def previous_tokens(job: LongFormJob, state: RecordingState) -> tuple[int, ...]:
    """The tokens before the window that are in its prompt."""
    if not job.sequential.carry_prompt:
        return tuple(state.tokens[state.forgotten :])
    prompt, recognizer = state.start.previous, job.recognizer
    text = tuple(state.tokens[max(state.forgotten, len(prompt)) :])
    # More would be cut from the left, where the prompt is.
    room = previous_room(recognizer.tokens, recognizer.context, job.options) - len(prompt)
    return prompt + (text[-room:] if room > 0 else ())


def decode_with_fallback(
    job: LongFormJob, states: AudioStates, windows: Sequence[Window]
) -> list[Hypothesis]:
    """One hypothesis a window, each at the first temperature at which it passes the thresholds."""
    results: dict[int, Hypothesis] = {}
    failed = list(range(len(windows)))
    for temperature in job.sequential.temperatures:
        again = [replace(windows[row], temperature=temperature) for row in failed]
        some = states if temperature == 0 else AudioStates(states.model_BSD)
        if len(failed) < len(windows):
            rows = failed + failed[:1] * (batch_bucket(len(failed)) - len(failed))
            some = AudioStates(states.model_BSD[jnp.array(rows)])
        hypotheses = decode(job.recognizer, some, job.options, again)
        results |= dict(zip(failed, hypotheses, strict=True))
        failed = [row for row in failed if needs_fallback(results[row], job.sequential)]
        if not failed:
            break
    return [results[row] for row in range(len(windows))]


def needs_fallback(hypothesis: Hypothesis, sequential: SequentialOptions) -> bool:
    """Whether a text repeats itself or is improbable, and is not silence."""
    ratio, doubt = sequential.compression_ratio_threshold, sequential.logprob_threshold
    if doubt is not None and hypothesis.mean_log_probability < doubt:
        silence = sequential.no_speech_threshold
        return silence is None or hypothesis.no_speech_probability <= silence
    return ratio is not None and hypothesis.compression_ratio > ratio


def segments_of(
    state: RecordingState,
    hypothesis: Hypothesis,
    tokens: WhisperTokens,
    sequential: SequentialOptions,
) -> WindowResult:
    """The segments of a window; none where it is silent."""
    silence, doubt = sequential.no_speech_threshold, sequential.logprob_threshold
    silent = silence is not None and hypothesis.no_speech_probability > silence
    if silent and (doubt is None or hypothesis.mean_log_probability <= doubt):
        return WindowResult([], state.size, closed=True, skipped=True)
    spans, moved = long_form.split_segments(hypothesis.tokens, tokens.times, state.size)
    at = lambda step: (state.seek + long_form.FRAMES_PER_STEP * step) / long_form.FRAME_RATE
    segments = [
        Segment(
            id=len(state.segments) + index,
            seek=state.seek,
            start=at(start),
            end=at(end),
            text=tokens.decode(ids),
            tokens=ids,
            temperature=hypothesis.temperature,
            avg_logprob=hypothesis.mean_log_probability,
            compression_ratio=hypothesis.compression_ratio,
            no_speech_prob=hypothesis.no_speech_probability,
        )
        for index, (start, end, ids) in enumerate(spans)
    ]
    return WindowResult(segments, moved, long_form.ends_alone(hypothesis.tokens, tokens.times))


def with_words(
    state: RecordingState, result: WindowResult, threshold: float | None
) -> WindowResult:
    """A window whose segments have words: unless it is closed, it ends with its last word.

    threshold: seconds of silence beside which improbable text is dropped.
    """
    segments, start = result.segments, state.second
    if not segments:
        return result
    spoken = last_word(segments, state.last_speech)
    frames_to = lambda second: max(round(second * long_form.FRAME_RATE) - state.seek, 1)
    if not result.closed and spoken > start:
        more = threshold is None or start + CHUNK_SECONDS - spoken > threshold
        result = result._replace(moved=frames_to(spoken) if more else state.size)
    if threshold is None:
        return result
    end, whole = start + state.size / long_form.FRAME_RATE, len(state.mel) / long_form.FRAME_RATE
    kept, resume, done = drop_hallucinations(
        segments, threshold, start, end, whole, state.last_speech
    )
    moved = result.moved if resume is None else frames_to(resume)
    return WindowResult(kept, moved, result.closed, skipped=not done)


def last_word(segments: Sequence[Segment], before: float) -> float:
    """Seconds at which the last word ended."""
    words = [word for segment in segments for word in segment.words or ()]
    return words[-1].end if words else segments[-1].end if segments else before
