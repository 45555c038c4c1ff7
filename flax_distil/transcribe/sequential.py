"""Long audio with Whisper's own algorithm (Radford et al. 2022, section 4.5).

A window of 30 s is decoded with timestamps, with the text before it as prompt; the next window
begins where the last whole segment ended. A text that repeats itself or is improbable is decoded
again at higher temperatures; silent windows are skipped. Several recordings advance together, one
window each, in one batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import pad_or_trim
from flax_distil.decode.hypothesis import Acceptance, Hypothesis, Window
from flax_distil.decode.prompts import previous_room
from flax_distil.decode.recognizer import (
    AudioStates,
    Recognizer,
    batch_bucket,
    check_memory,
    decode,
    encode_audio,
    likeliest_languages,
    pad_batch,
)
from flax_distil.model.dims import CHUNK_FRAMES
from flax_distil.options import DecodeOptions, SequentialOptions
from flax_distil.transcribe.features import clip_mel, pad_window, recording_mel
from flax_distil.transcribe.result import Segment, Transcript
from flax_distil.transcribe.segments import (
    FRAME_RATE,
    Place,
    WindowResult,
    last_word,
    segments_of,
    with_words,
)
from flax_distil.transcribe.words import TextSpan, word_timestamps

FORGET_ABOVE = 0.5  # a text drawn at a higher temperature is not in the next window's prompt


@dataclass
class RecordingState:
    """How far one recording has been transcribed.

    mel: of the recording. clips: first and last frames that are left. start: what all its windows
    have in common.
    """

    mel: Float32[np.ndarray, "T M"]
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
    def place(self) -> Place:
        """The window's."""
        return Place(self.seek, self.size, len(self.mel), len(self.segments), self.last_speech)

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
        seconds, self.reported = (frames - self.reported) / FRAME_RATE, frames
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

    def transcript(self, recognizer: Recognizer) -> Transcript:
        """Of all windows so far."""
        text = recognizer.tokens.decode(self.tokens[len(self.start.previous) :])
        language = self.start.language or "en"
        return Transcript(text, tuple(self.segments), language, self.acceptance)


def transcribe_sequentially(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "_"]],
    options: DecodeOptions,
    sequential: SequentialOptions,
    start: Window,
    batch_size: int = 8,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    At most `batch_size` recordings are held at a time; when one is complete the next begins. An
    assistant drafts at temperature 0 only, so that it changes no text.

    start: what all windows have in common (`prepare`); its language is detected where it is None.

    Raises:
        InputError: the device lacks the memory.
    """
    options = replace(options, timestamps=True)
    check_memory(recognizer, batch_bucket(batch_size), options, max(sequential.temperatures))
    waiting = enumerate(waveforms)
    active: dict[int, RecordingState] = {}
    while True:
        for number, waveform in islice(waiting, batch_size - len(active)):
            active[number] = begin_recording(recognizer, waveform, start, sequential)
        for number in [number for number, one in active.items() if not one.next_window()]:
            one = active.pop(number)
            yield number, one.progress(len(one.mel)), one.transcript(recognizer)
        if not active:
            if (following := next(waiting, None)) is None:
                return
            active[following[0]] = begin_recording(recognizer, following[1], start, sequential)
            continue
        # As in faster-whisper, only the first window begins with the prefix.
        first = [one for one in active.values() if one.first and options.prefix]
        later = [one for one in active.values() if not (one.first and options.prefix)]
        for some, prefix in ((first, options.prefix), (later, None)):
            if some:
                transcribe_windows(recognizer, some, replace(options, prefix=prefix), sequential)
        for number, one in active.items():
            yield number, one.progress(min(one.seek, len(one.mel))), None


def begin_recording(
    recognizer: Recognizer,
    waveform: Float32[np.ndarray, "n"],
    start: Window,
    sequential: SequentialOptions,
) -> RecordingState:
    """The state before the first window; the language is detected from the first 30 s."""
    mel_TM = recording_mel(waveform, recognizer.spec.dims.mels)
    if start.language is None and len(mel_TM) and recognizer.tokens.multilingual:
        # As in openai-whisper silence follows a short recording, zeros follow a window.
        short = len(mel_TM) < CHUNK_FRAMES
        first_TM = (
            clip_mel(pad_or_trim(waveform), mel_TM.shape[1]) if short else mel_TM[:CHUNK_FRAMES]
        )
        states = encode_audio(recognizer, first_TM[None], drafting=False)
        start = replace(start, language=likeliest_languages(recognizer, states.model_BSD)[0])
    points = [round(second * FRAME_RATE) for second in sequential.clips] or [0]
    points += [len(mel_TM)] * (len(points) % 2)
    clips = list(zip(points[::2], points[1::2], strict=True))
    return RecordingState(mel_TM, clips, start, tokens=list(start.previous))


def transcribe_windows(
    recognizer: Recognizer,
    active: Sequence[RecordingState],
    options: DecodeOptions,
    sequential: SequentialOptions,
) -> None:
    """Adds one window of each recording; the assistant is used where it pays for any of them."""
    assistant = recognizer.assistant
    drafting = assistant is not None and any(assistant.pays(one.acceptance) for one in active)
    mel_BTM = pad_batch(np.stack([pad_window(one.mel, one.seek, one.size) for one in active]))
    states = encode_audio(recognizer, mel_BTM, drafting=drafting)
    windows = [
        replace(
            one.start,
            previous=previous_tokens(one, recognizer, options, sequential),
            seed=one.start.seed + one.seek,
        )
        for one in active
    ]
    hypotheses = decode_with_fallback(recognizer, states, options, windows, sequential)
    results = [
        segments_of(one.place, hypothesis, recognizer.tokens, sequential)
        for one, hypothesis in zip(active, hypotheses, strict=True)
    ]
    if sequential.word_timestamps:
        timed = word_timestamps(
            recognizer,
            states.model_BSD,
            [[TextSpan(s.tokens, s.start, s.end) for s in result.segments] for result in results],
            [one.start.language or "en" for one in active],
            task=options.task,
            frames=[one.size for one in active],
            offsets=[one.place.start for one in active],
            last_speech=[one.last_speech for one in active],
        )
        threshold = sequential.hallucination_silence_threshold
        results = [
            with_words(one.place, result, spans, threshold)
            for one, result, spans in zip(active, results, timed, strict=True)
        ]
    keep = sequential.condition_on_previous_text and recognizer.previous_text
    for one, result, hypothesis in zip(active, results, hypotheses, strict=True):
        one.acceptance = Acceptance.total((one.acceptance, hypothesis.acceptance))
        one.add(result)
        if not result.skipped and (hypothesis.temperature > FORGET_ABOVE or not keep):
            one.forgotten = len(one.tokens)


def previous_tokens(
    state: RecordingState,
    recognizer: Recognizer,
    options: DecodeOptions,
    sequential: SequentialOptions,
) -> tuple[int, ...]:
    """The tokens before the window that are in its prompt."""
    if not sequential.carry_prompt:
        return tuple(state.tokens[state.forgotten :])
    prompt = state.start.previous
    text = tuple(state.tokens[max(state.forgotten, len(prompt)) :])
    # More would be cut from the left, where the prompt is.
    room = previous_room(recognizer.tokens, recognizer.context, options) - len(prompt)
    return prompt + (text[-room:] if room > 0 else ())


def decode_with_fallback(
    recognizer: Recognizer,
    states: AudioStates,
    options: DecodeOptions,
    windows: Sequence[Window],
    sequential: SequentialOptions,
) -> list[Hypothesis]:
    """One hypothesis a window, each at the first temperature at which it passes the thresholds."""
    results: dict[int, Hypothesis] = {}
    failed = list(range(len(windows)))
    for temperature in sequential.temperatures:
        again = [replace(windows[row], temperature=temperature) for row in failed]
        some = states if temperature == 0 else AudioStates(states.model_BSD)
        if len(failed) < len(windows):
            rows = failed + failed[:1] * (batch_bucket(len(failed)) - len(failed))
            some = AudioStates(states.model_BSD[jnp.array(rows)])
        hypotheses = decode(recognizer, some, options, again)
        results |= dict(zip(failed, hypotheses, strict=True))
        failed = [row for row in failed if needs_fallback(results[row], sequential)]
        if not failed:
            break
    return [results[row] for row in range(len(windows))]


def needs_fallback(hypothesis: Hypothesis, sequential: SequentialOptions) -> bool:
    """Whether a text repeats itself or is improbable, and is not silence."""
    ratio, doubt = sequential.compression_ratio_threshold, sequential.logprob_threshold
    doubted = doubt is not None and hypothesis.mean_log_probability < doubt
    silent = sequential.no_speech_threshold is not None and (
        hypothesis.no_speech_probability > sequential.no_speech_threshold
    )
    if doubted:
        return not silent
    return ratio is not None and hypothesis.compression_ratio > ratio
