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
from flax_distil.decode.recognizer import GREEDY, Recognizer, make_recognizer, prepare
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.options import ChunkedOptions, DecodeOptions, SequentialOptions, VoiceOptions
from flax_distil.transcribe.chunked import transcribe_in_chunks
from flax_distil.transcribe.result import Transcript
from flax_distil.transcribe.sequential import transcribe_sequentially
from flax_distil.transcribe.voice import restored, voiced

LongForm = SequentialOptions | ChunkedOptions
WHISPER = SequentialOptions()


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
    long_form: LongForm = WHISPER,
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
        overlapping chunks in batches, which is fast and needs no timestamps.
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
        model = model.with_assistant(assistant)
    waveform = _checked(audio) if isinstance(audio, np.ndarray) else load_audio(audio)
    transcripts = transcribe_all(
        model,
        [waveform],
        replace(options, task=task or options.task),
        long_form,
        language=language,
        prompt=prompt,
        seed=seed,
        batch_size=batch_size,
        voice=voice,
    )
    for _, _, transcript in transcripts:
        if transcript is not None:
            return transcript
    raise AssertionError("a recording has no transcript")


def transcribe_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "_"]],
    options: DecodeOptions = GREEDY,
    long_form: LongForm = WHISPER,
    *,
    language: str | None = None,
    prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    voice: VoiceOptions | None = None,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    Windows of several recordings share a batch; recordings are read when there is room. The
    arguments are those of `transcribe`.

    Raises:
        InputError: the model lacks the language or task, the device the memory, the assistant
            cannot be used with this search, or voice-activity detection is not installed.
    """
    sequential = isinstance(long_form, SequentialOptions)
    if voice is not None and sequential and long_form.clips:
        raise InputError(
            f"clips are {long_form.clips} and voice-activity detection finds its own: leave "
            "out one of the two"
        )
    if sequential:
        options = replace(options, timestamps=True)
    start = replace(prepare(recognizer, options, batch_size, language, prompt), seed=seed)

    def read(waveforms: Iterable[np.ndarray]) -> Iterator[tuple[int, float, Transcript | None]]:
        method = (recognizer, waveforms, options)
        if isinstance(long_form, SequentialOptions):
            return transcribe_sequentially(*method, long_form, start, batch_size)
        return transcribe_in_chunks(*method, long_form, start, batch_size)

    return read(waveforms) if voice is None else _voiced_only(read, waveforms, voice)


def _voiced_only(
    read: Callable[[Iterable[np.ndarray]], Iterator[tuple[int, float, Transcript | None]]],
    waveforms: Iterable[Float32[np.ndarray, "_"]],
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
