"""One recording or many, of any length, to transcripts."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import AudioSource, load_audio
from flax_distil.decode.options import DecodeOptions
from flax_distil.decode.recognizer import Recognizer, make_recognizer
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe.chunked import ChunkedOptions, transcribe_in_chunks
from flax_distil.transcribe.result import Transcript
from flax_distil.transcribe.sequential import SequentialOptions, transcribe_sequentially

LongForm = SequentialOptions | ChunkedOptions
GREEDY, WHISPER = DecodeOptions(), SequentialOptions()


def transcribe(
    audio: AudioSource | np.ndarray,
    model: str | Path | Recognizer,
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
    batch_size: int = 8,
    dtype: str = "float32",
    options: DecodeOptions = GREEDY,
    long_form: LongForm = WHISPER,
) -> Transcript:
    """What is said in `audio`, in the language spoken or, where `task` is translate, in English.

    audio: a path, the bytes of a file, an open file, or a 16 kHz mono waveform.
    model: a folder or name for `load_checkpoint`, or a `Recognizer`, which loads once for many.
    language: code or name; None lets the model guess it from the first 30 s.
    long_form: how long audio is read: `SequentialOptions` as Whisper does it, with times;
        `ChunkedOptions` in batches, for speed and for models that were taught no timestamps.

    Audio without any sound has no text.

    Raises:
        InputError: the audio or the model cannot be used, or the model lacks the language.
    """
    if not isinstance(model, Recognizer):
        model = make_recognizer(load_checkpoint(model), dtype)
    waveform = _checked(audio) if isinstance(audio, np.ndarray) else load_audio(audio)
    options = replace(options, language=language or options.language, task=task)
    for _, _, transcript in transcribe_all(model, [waveform], options, long_form, batch_size):
        if transcript is not None:
            return transcript
    raise AssertionError("a recording has no transcript")


def transcribe_all(
    recognizer: Recognizer,
    waveforms: Iterable[Float32[np.ndarray, "n"]],
    options: DecodeOptions = GREEDY,
    long_form: LongForm = WHISPER,
    batch_size: int = 8,
) -> Iterator[tuple[int, float, Transcript | None]]:
    """Yields (number of the recording, seconds read since, its transcript once it is complete).

    Windows of several recordings share a batch; recordings are asked for when there is room.

    Raises:
        InputError: the model lacks the language or task, or the device the memory.
    """
    if isinstance(long_form, SequentialOptions):
        return transcribe_sequentially(recognizer, waveforms, options, long_form, batch_size)
    return transcribe_in_chunks(recognizer, waveforms, options, long_form, batch_size)


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
