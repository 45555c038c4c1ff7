"""One recording or many, of any length, to transcripts."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from flax_distil.audio.load import SAMPLE_RATE, AudioSource, load_audio
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.recognizer import (
    GREEDY,
    Recognizer,
    check_memory,
    make_recognizer,
    prepare,
)
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import ChunkedOptions, DecodeOptions, SequentialOptions, VoiceOptions
from flax_distil.transcription.chunked import transcribe_in_chunks
from flax_distil.transcription.long_form import LongFormJob, Progress, Samples
from flax_distil.transcription.sequential import transcribe_sequentially
from flax_distil.transcription.silence import restored, voiced
from flax_distil.transcription.transcript import Transcript

LongForm = SequentialOptions | ChunkedOptions

log = logging.getLogger(__name__)


def transcribe(
    audio: AudioSource | np.ndarray,
    model: str | Path | Recognizer,
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] | None = None,
    prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    options: DecodeOptions = GREEDY,
    long_form: LongForm | None = None,
    assistant: str | Path | Assistant | None = None,
    voice: VoiceOptions | None = None,
) -> Transcript:
    """The transcript of `audio`, in the language spoken or, with task "translate", in English.

    audio: a path, the bytes of a file, an open file, or a 16 kHz mono waveform.
    model: a folder or name for `load_checkpoint`, or a `Recognizer`, which is loaded only once.
    language: code or name; by default it is detected from the first 30 s.
    task: if given, replaces that of `options`.
    prompt: text before the audio, for names and style.
    seed: random seed for sampling.
    options: how windows are decoded. The sequential method always uses timestamps.
    long_form: `SequentialOptions` for Whisper's own algorithm, with times; `ChunkedOptions` for
        overlapping chunks in batches, which is fast and needs no timestamps. By default the first,
        or the second for a student that was trained without timestamps.
    assistant: folder or name of a student or smaller Whisper, "lookup", or an `Assistant`:
        speculative decoding, which returns the same text. The transcript's `acceptance` says how
        many draft tokens were accepted.
    voice: cuts out pauses first, by voice-activity detection (extra `vad`).

    Digital silence has no text.

    Raises:
        InputError: the audio, the model or the assistant cannot be used, or the model lacks the
            language.
    """
    if not isinstance(model, Recognizer):
        model = make_recognizer(load_checkpoint(model), dtype)
    if isinstance(assistant, str | Path):
        assistant = load_assistant(model, assistant)
    if assistant is not None:
        model = replace(model, assistant=assistant)
    waveform = _checked(audio) if isinstance(audio, np.ndarray) else load_audio(audio)
    options = replace(options, task=task or options.task)
    given = {"language": language, "prompt": prompt, "seed": seed, "voice": voice}
    *_, (_, _, transcript) = transcribe_all(
        model, [waveform], options, long_form, batch_size=batch_size, **given
    )
    assert transcript is not None
    return transcript


def transcribe_all(
    recognizer: Recognizer,
    waveforms: Iterable[Samples],
    options: DecodeOptions = GREEDY,
    long_form: LongForm | None = None,
    *,
    language: str | None = None,
    prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    voice: VoiceOptions | None = None,
) -> Iterator[Progress]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    Windows of several recordings share a batch; recordings are read when there is room. The
    arguments are those of `transcribe`.

    Raises:
        InputError: the model lacks the language or task, the device the memory, the assistant
            cannot be used with this search, or voice-activity detection is not installed.
    """
    if long_form is None:
        long_form = SequentialOptions() if recognizer.timestamps else ChunkedOptions()
    if isinstance(long_form, SequentialOptions):
        if not recognizer.timestamps:
            log.warning(
                "the model was trained without timestamps, which the sequential method needs: the "
                "chunked method is right for it (--method chunked, ChunkedOptions)"
            )
        if voice is not None and long_form.clips:
            raise InputError(
                f"clips are {long_form.clips} and voice-activity detection finds its own: leave "
                "out one of the two"
            )
        options = replace(options, timestamps=True)
        check_memory(recognizer, batch_size, options, max(long_form.temperatures))
    start = replace(prepare(recognizer, options, batch_size, language, prompt), seed=seed)
    job = LongFormJob(recognizer, options, start, batch_size)
    if isinstance(long_form, SequentialOptions):
        read, job = transcribe_sequentially, replace(job, sequential=long_form)
    else:
        read, job = transcribe_in_chunks, replace(job, chunked=long_form)
    return read(job, waveforms) if voice is None else _voiced_only(read, job, waveforms, voice)


def _voiced_only(
    read: Callable[[LongFormJob, Iterable[Samples]], Iterator[Progress]],
    job: LongFormJob,
    waveforms: Iterable[Samples],
    voice: VoiceOptions,
) -> Iterator[Progress]:
    """What `read` yields for the speech of the recordings, in the recordings' times."""
    spans, left = {}, {}  # by recording; left: seconds that are not read yet

    def speech() -> Iterator[Samples]:
        for number, waveform in enumerate(waveforms):
            left[number] = waveform.size / SAMPLE_RATE
            part, spans[number] = voiced(waveform, voice)
            yield part

    for number, seconds, transcript in read(job, speech()):
        if transcript is None:
            left[number] -= seconds
            yield number, seconds, None
        else:  # the pauses are read too
            yield number, left.pop(number), restored(transcript, spans.pop(number))


def _checked(waveform: np.ndarray) -> Samples:
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise InputError(
            f"the waveform is {waveform.dtype} of shape {waveform.shape}: give one channel of "
            "floats in [-1, 1] at 16 kHz, or the file's path"
        )
    if not np.isfinite(waveform).all():
        raise InputError(
            f"{np.sum(~np.isfinite(waveform))} samples are NaN or infinite: decode the audio again"
        )
    return waveform.astype(np.float32)
