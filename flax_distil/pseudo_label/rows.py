"""A row of a label store: what the teacher wrote, beside the reference and compared with it."""

from typing import Any, Literal

from flax_distil.data.utterances import Utterance
from flax_distil.data.windows import DecodedClip
from flax_distil.decode.options import Hypothesis
from flax_distil.pseudo_label.store import PseudoLabel
from flax_distil.text.wer import error_rate


def pseudo_label(
    number: int,
    clip: DecodedClip,
    audio: dict[str, Any],
    hypothesis: Hypothesis,
    task: str = "transcribe",
    asked: Literal["auto", "wer", "cer"] = "auto",
) -> PseudoLabel:
    """One row: the hypothesis beside the reference, both normalised to count the errors.

    Without speech nothing is counted: whatever was written was made up.
    """
    utterance, errors, parts, judged = clip.utterance, None, None, {}
    speech = speaks(utterance)
    rate = error_rate("en" if task == "translate" else hypothesis.language, asked)
    if utterance.text is not None and speech:
        errors = rate.count([utterance.text], [hypothesis.text])
        parts = [part.text or "" for part in utterance.parts]
    if parts:
        counts = rate.count_parts(parts, hypothesis.text)
        judged = {
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
        **judged,
        distributions=getattr(hypothesis, "distributions", None),
        audio_SD=getattr(hypothesis, "audio_SD", None),
    )


def speaks(utterance: Utterance) -> bool:
    """Whether anybody speaks in it, as far as is known: not where its reference is empty."""
    if utterance.parts:
        return any(map(speaks, utterance.parts))
    return utterance.speech and (utterance.text is None or bool(utterance.text.strip()))
