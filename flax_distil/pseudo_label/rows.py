"""Rows of a label store: audio, the teacher's label, and its errors against the reference."""

import os
from typing import Any, Literal

import numpy as np

from flax_distil.audio.load import encode_flac
from flax_distil.data.table import escape
from flax_distil.data.utterances import Skipped, Utterance
from flax_distil.data.windows import DecodedClip
from flax_distil.decode.hypothesis import Hypothesis
from flax_distil.errors import InputError
from flax_distil.pseudo_label.store import PseudoLabel
from flax_distil.text.wer import error_rate

AudioCell = dict[str, Any]
"""{bytes, path}, as `datasets` stores audio."""


def audio_cells(
    utterance: Utterance, clips: list[DecodedClip], store_audio: Literal["embed", "reference"]
) -> list[AudioCell] | Skipped:
    """The audio cell of each clip's row.

    Raises InputError for references to an utterance that is only a part of a file.
    """
    if store_audio == "embed":
        return [embedded(clip) for clip in clips]
    if not isinstance(utterance.audio, str) or utterance.offset is not None:
        raise InputError(
            f"{utterance.id} is not a file of its own, so the store cannot refer to it: use "
            "store_audio embed"
        )
    if escape(utterance.audio) != utterance.audio:
        return Skipped(
            utterance.id, "Parquet cannot hold its name: rename it, or use store_audio embed"
        )
    # Absolute, because the store may be read from another folder.
    path = utterance.audio if "://" in utterance.audio else os.path.abspath(utterance.audio)
    return [{"bytes": None, "path": path} for _ in clips]


def embedded(clip: DecodedClip) -> AudioCell:
    """The audio cell of a clip whose samples are kept in the store, as FLAC."""
    contents = encode_flac(clip.samples.astype(np.float32) / 32768.0)
    return {"bytes": contents, "path": f"{clip.utterance.id}.flac"}


def pseudo_label(
    number: int,
    clip: DecodedClip,
    audio: AudioCell,
    hypothesis: Hypothesis,
    task: str = "transcribe",
    unit: Literal["auto", "wer", "cer"] = "auto",
) -> PseudoLabel:
    """The row of one clip, with the errors of the hypothesis against the reference.

    number: position of the utterance in the dataset. Clips without speech have no error counts.
    """
    utterance, errors, parts, of_parts = clip.utterance, None, None, {}
    speech = has_speech(utterance)
    rate = error_rate("en" if task == "translate" else hypothesis.language, unit)
    if utterance.text is not None and speech:
        errors = rate.count([utterance.text], [hypothesis.text])
        parts = [part.text or "" for part in utterance.parts]
    if parts:
        counts = rate.count_parts(parts, hypothesis.text)
        of_parts = {
            "part_references": tuple(parts),
            "part_errors": tuple(errors for errors, _ in counts),
            "part_words": tuple(words for _, words in counts),
        }
    return PseudoLabel(
        id=utterance.id,
        audio=audio,
        reference=utterance.text,
        whisper_transcript=hypothesis.text,
        token_ids=tuple(hypothesis.tokens),
        duration=clip.duration,
        language=hypothesis.language,
        speaker=utterance.speaker,
        recording=utterance.recording,
        utterance_number=number,
        mean_log_probability=hypothesis.mean_log_probability,
        compression_ratio=hypothesis.compression_ratio,
        no_speech_probability=hypothesis.no_speech_probability,
        wer=errors.rate if errors and errors.reference_words else None,
        word_errors=errors and errors.errors,
        reference_words=errors and errors.reference_words,
        error_rate=errors and rate.unit,
        ended=hypothesis.ended,
        speech=speech,
        **of_parts,
        teacher_states=getattr(hypothesis, "teacher_states", None),
        audio_SD=getattr(hypothesis, "audio_SD", None),
    )


def has_speech(utterance: Utterance) -> bool:
    """Whether the utterance contains speech: its reference, if it has one, must not be empty."""
    if utterance.parts:
        return any(map(has_speech, utterance.parts))
    return utterance.speech and (utterance.text is None or bool(utterance.text.strip()))
