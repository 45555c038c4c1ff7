"""The plain way through long audio: windows of 30 s one after the other, a segment each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import CLIP_SAMPLES, SAMPLE_RATE, AudioSource, load_audio, pad_or_trim
from flax_distil.decode.options import DecodeOptions, Hypothesis
from flax_distil.decode.recognizer import Recognizer, make_recognizer, recognize
from flax_distil.errors import InputError
from flax_distil.model.checkpoint import load_checkpoint
from flax_distil.transcribe.result import Segment, Transcript

FRAMES = 100  # a second, in which openai-whisper counts `seek`


def transcribe(
    audio: AudioSource | np.ndarray,
    model: str | Path | Recognizer,
    *,
    language: str | None = None,
    task: Literal["transcribe", "translate"] = "transcribe",
    batch_size: int = 8,
    dtype: str = "float32",
) -> Transcript:
    """What is said in `audio`, in the language spoken or, where `task` is translate, in English.

    audio: a path, the bytes of a file, an open file, or a 16 kHz mono waveform.
    model: a folder or name for `load_checkpoint`, or a `Recognizer`, which loads once for many.
    language: code or name; None lets the model guess it from the first 30 s.

    Audio over 30 s is cut into windows of 30 s, decoded `batch_size` at a time: a word on a cut
    may be lost.

    Raises:
        InputError: the audio or the model cannot be used, or the model lacks the language.
    """
    if not isinstance(model, Recognizer):
        model = make_recognizer(load_checkpoint(model), dtype)
    waveform = _checked(audio) if isinstance(audio, np.ndarray) else load_audio(audio)
    windows = cut(waveform)
    hypotheses: list[Hypothesis] = []
    while len(hypotheses) < len(windows):
        # The first window alone, where it has to tell the language of the others.
        count = (
            1 if language is None and model.tokens.multilingual and not hypotheses else batch_size
        )
        batch = windows[len(hypotheses) : len(hypotheses) + count]
        hypotheses += recognize(model, np.stack(batch), DecodeOptions(language, task))
        language = hypotheses[0].language
    return assemble(hypotheses, waveform.size / SAMPLE_RATE, language or "en")


def cut(waveform: Float32[np.ndarray, "n"]) -> list[Float32[np.ndarray, "480000"]]:
    """Windows of 30 s one after the other, the last filled up with silence."""
    starts = range(0, waveform.size, CLIP_SAMPLES)
    return [pad_or_trim(waveform[start:]) for start in starts]


def assemble(hypotheses: Sequence[Hypothesis], duration: float, language: str) -> Transcript:
    """One segment a window; `duration` of the whole audio in seconds."""
    segments = []
    for index, heard in enumerate(hypotheses):
        start = index * CLIP_SAMPLES / SAMPLE_RATE
        segments.append(
            Segment(
                id=index,
                seek=round(start * FRAMES),
                start=start,
                end=min(start + CLIP_SAMPLES / SAMPLE_RATE, duration),
                text=f" {heard.text}" if heard.text else "",
                tokens=heard.tokens,
                temperature=0.0,
                avg_logprob=heard.mean_log_probability,
                compression_ratio=heard.compression_ratio,
                no_speech_prob=heard.no_speech_probability,
            )
        )
    text = "".join(segment.text for segment in segments)
    return Transcript(text, tuple(segments), language)


def _checked(waveform: np.ndarray) -> Float32[np.ndarray, "n"]:
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise InputError(
            f"the waveform is {waveform.dtype} of shape {waveform.shape}: give one channel of "
            "floats in [-1, 1] at 16 kHz, or the file's path"
        )
    if not np.isfinite(waveform).all():
        raise InputError(f"{np.sum(~np.isfinite(waveform))} samples are NaN or infinite")
    return waveform.astype(np.float32)
