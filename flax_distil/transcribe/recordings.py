"""One recording or many, of any length, to transcripts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import SAMPLE_RATE, AudioSource, load_audio
from flax_distil.decode.assistant import load_assistant
from flax_distil.decode.drafters import Assistant
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import Recognizer, make_recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe.chunked import transcribe_in_chunks
from flax_distil.transcribe.options import ChunkedOptions, SequentialOptions
from flax_distil.transcribe.result import Transcript
from flax_distil.transcribe.sequential import transcribe_sequentially
from flax_distil.transcribe.voice import VoiceOptions, restored, voiced

LongForm = SequentialOptions | ChunkedOptions
GREEDY, WHISPER = DecodeOptions(), SequentialOptions()


def transcribe(
    audio: AudioSource | np.ndarray,
    model: str | Path | Recognizer,
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    options: DecodeOptions = GREEDY,
    long_form: LongForm = WHISPER,
    assistant: str | Path | Assistant | None = None,
    voice: VoiceOptions | None = None,
) -> Transcript:
    """What is said in `audio`, in the language spoken or, where the task is translate, in English.

    audio: a path, the bytes of a file, an open file, or a 16 kHz mono waveform.
    model: a folder or name for `load_checkpoint`, or a `Recognizer`, which loads once for many.
    language: code or name; None lets the model guess it from the first 30 s.
    options: how a window is decoded; `language` and `task`, where given, win. Whisper's way of
        reading has temperatures of its own and always timestamps.
    long_form: how long audio is read: `SequentialOptions` as Whisper does it, with times;
        `ChunkedOptions` in batches, for speed and for models that were taught no timestamps.
    assistant: a student's or smaller Whisper's folder or name, "lookup", or an `Assistant`: drafts
        what the model verifies, so that the same text needs fewer passes of the model. How many is
        in the transcript's `acceptance`.
    voice: cuts out the pauses first, by voice-activity detection (extra `vad`).

    Audio without any sound has no text.

    Raises:
        InputError: the audio, the model or the assistant cannot be used, or the model lacks the
            language.
    """
    if not isinstance(model, Recognizer):
        model = make_recognizer(load_checkpoint(model), dtype)
    if isinstance(assistant, str | Path):
        assistant = load_assistant(model, assistant)
    waveform = _checked(audio) if isinstance(audio, np.ndarray) else load_audio(audio)
    options = replace(options, language=language or options.language, task=task or options.task)
    found = transcribe_all(model, [waveform], options, long_form, batch_size, assistant, voice)
    for _, _, transcript in found:
        if transcript is not None:
            return transcript
    raise AssertionError("a recording has no transcript")


def transcribe_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions = GREEDY,
    long_form: LongForm = WHISPER,
    batch_size: int = 8,
    assistant: Assistant | None = None,
    voice: VoiceOptions | None = None,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    Windows of several recordings share a batch; recordings are asked for when there is room.

    Raises:
        InputError: the model lacks the language or task, the device the memory, the assistant
            cannot help this search, or voice-activity detection is not there.
    """
    if voice is not None:
        if isinstance(long_form, SequentialOptions) and long_form.clips:
            raise InputError(
                f"clips are {long_form.clips} and voice-activity detection finds its own: leave "
                "out one of the two"
            )
        rest = (options, long_form, batch_size, assistant)
        read = lambda waveforms: transcribe_all(recognizer, waveforms, *rest)
        return _voiced_only(read, waveforms, voice)
    arguments = (recognizer, waveforms, options)
    if isinstance(long_form, SequentialOptions):
        return transcribe_sequentially(*arguments, long_form, batch_size, assistant)
    return transcribe_in_chunks(*arguments, long_form, batch_size, assistant)


def _voiced_only(
    read: Callable[[Iterable[np.ndarray]], Iterator[tuple[int, float, Transcript | None]]],
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    voice: VoiceOptions,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """What `read` yields for the speech of the recordings, in the recordings' times."""
    spans, left = {}, {}  # by recording; left: seconds that are not read yet

    def speech() -> Iterator[np.ndarray]:
        for number, waveform in enumerate(waveforms):
            speech, spans[number], samples = voiced(waveform, voice)
            left[number] = samples / SAMPLE_RATE
            yield speech

    for number, seconds, transcript in read(speech()):
        if transcript is None:
            left[number] -= seconds
            yield number, seconds, None
        else:  # the pauses are read too
            yield number, left.pop(number), restored(transcript, spans.pop(number))


def _checked(waveform: np.ndarray) -> Float32[np.ndarray, "n"]:
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
