"""How close a student's probabilities at the start of transcript are to its teacher's.

The language token decides in which language a clip is transcribed, the no-speech token whether a
window is skipped. Only the KL at `<|startoftranscript|>` trains them, and no error rate shows them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_distil.audio.load import CLIP_SAMPLES, pad_or_trim
from flax_distil.audio.noise import white_noise
from flax_distil.decode.recognizer import Recognizer, recognize
from flax_distil.options import DecodeOptions


class Agreement(NamedTuple):
    """language: share of the speech with the same most probable language; None for English-only
    models. no_speech: kind of sound → median |difference| of the no-speech probability.
    """

    language: float | None
    no_speech: dict[str, float]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in self.no_speech.items())
        known = "" if self.language is None else f"same language {100 * self.language:.0f} %; "
        return f"{known}no-speech probability differs by (median): {kinds}"


def agreement(
    teacher: Recognizer,
    student: Recognizer,
    speech: Sequence[Float32[np.ndarray, "_"]],
    decibels: Sequence[float] = (-60.0, -50.0, -40.0, -30.0, -20.0),
    seed: int = 0,
    batch_size: int = 8,
) -> Agreement:
    """Compare both models on clips of speech, on silence and on white noise.

    speech: 16 kHz, at most 30 s each. decibels: levels of the noise, relative to full scale, one
    clip each.
    """
    noise = [
        10 ** (level / 20) * white_noise((seed, number), CLIP_SAMPLES)
        for number, level in enumerate(decibels)
    ]
    silence, same, differences = [np.zeros(CLIP_SAMPLES, np.float32)], {}, {}
    for kind, clips in {"speech": speech, "silence": silence, "noise": noise}.items():
        (ours, p), (theirs, q) = (starts(one, clips, batch_size) for one in (student, teacher))
        same[kind] = float(np.mean(ours == theirs))
        differences[kind] = float(np.median(np.abs(p - q)))
    return Agreement(same["speech"] if teacher.tokens.multilingual else None, differences)


def starts(
    recognizer: Recognizer, clips: Sequence[Float32[np.ndarray, "_"]], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable language of each clip, and its no-speech probability."""
    recognizer = replace(recognizer, language=None)  # a student of one language would name it
    options = DecodeOptions(max_tokens=1)
    found = [
        hypothesis
        for start in range(0, len(clips), batch_size)
        for hypothesis in recognize(
            recognizer, np.stack([*map(pad_or_trim, clips[start : start + batch_size])]), options
        )
    ]
    languages = np.array([one.language for one in found])
    return languages, np.array([one.no_speech_probability for one in found])
