"""How windows are decoded and long audio is transcribed: shared by the Python interface, the
command line and recipes; a field's docstring is its `--help`."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from tyro.conf import arg

from flax_distil.errors import InputError

WINDOW_SECONDS = 30  # the encoder's input


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode windows of at most 30 seconds: all that decides the search."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """Transcribe in the language spoken, or translate into English (multilingual models)."""
    timestamps: bool = False
    """Predict timestamp tokens, under Whisper's timestamp rules. The sequential method always
    does; in the chunked method they divide the text into segments."""
    max_tokens: int = 224
    """Most tokens of a window: by default half of the context, as in Whisper."""
    max_initial_timestamp: float = 1.0
    """With timestamps: latest second of a window's first timestamp."""
    beams: int = 1
    """Beams of the beam search; 1 is greedy search."""
    patience: float = 1.0
    """Beam search stops when beams x patience texts have ended (arXiv 2204.05424)."""
    length_penalty: float | None = None
    """Texts of beams or samples are ranked by their log-probability over ((5 + length) / 6) to this
    power, 0 to 1; without it, by the mean log-probability of a token."""
    best_of: int = 1
    """Texts drawn where the temperature is above 0; the best one is returned."""
    hotwords: str | None = None
    """Words to expect; put before the previous text of every window."""
    prefix: str | None = None
    """Beginning of the text: of the first window, or of every chunk. The result includes it."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less probable that the window's text contains already."""
    no_repeat_ngram: int = 0
    """No sequence of this many tokens occurs twice in a window; 0 allows it."""

    def __post_init__(self):
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("max_initial_timestamp", self.max_initial_timestamp, 0),
            ("beams", self.beams, 1),
            ("best_of", self.best_of, 1),
            ("no_repeat_ngram", self.no_repeat_ngram, 0),
        ):
            if not value >= least:
                raise InputError(f"{name} is {value}: it must be at least {least}")
        for name in ("patience", "repetition_penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: it must be a number above 0")
        if not 0 <= (self.length_penalty or 0) <= 1:
            raise InputError(f"length_penalty is {self.length_penalty}: it must be from 0 to 1")
        if round(self.beams * self.patience) < 1:
            raise InputError(
                f"{self.beams} beams with patience {self.patience} stop before the first text has "
                f"ended: use a patience of at least {1 / self.beams:.2g}"
            )


@dataclass(frozen=True)
class SequentialOptions:
    """Whisper's own long-form algorithm; the defaults are Whisper's."""

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Temperatures tried in turn until a window's text passes the thresholds below."""
    compression_ratio_threshold: float | None = 2.4
    """A text that compresses better than this repeats itself and is decoded again."""
    logprob_threshold: float | None = -1.0
    """A text with a lower mean log-probability is decoded again."""
    no_speech_threshold: float | None = 0.6
    """A window with a higher no-speech probability is silent, if the mean
    log-probability of its text is below its threshold."""
    condition_on_previous_text: bool = True
    """Give each window the text before it as prompt, if the model was trained so."""
    carry_prompt: bool = False
    """Give the prompt to every window, not only to the first."""
    clips: tuple[float, ...] = ()
    """Start, end, start, ... in seconds of the parts to transcribe; all by default."""
    word_timestamps: bool = False
    """Time each word; the next window then begins after the last word."""
    hallucination_silence_threshold: float | None = None
    """With word timestamps: drop text that is probably hallucinated between pauses of
    this many seconds, and skip the silence."""

    def __post_init__(self):
        if self.hallucination_silence_threshold is not None and not self.word_timestamps:
            raise InputError(
                "hallucination_silence_threshold needs the times of words: add word_timestamps"
            )
        if not self.temperatures or min(self.temperatures) < 0:
            raise InputError(f"temperatures are {self.temperatures}: give some, none below 0")
        times = (0.0, *self.clips)
        if not all(one <= following < math.inf for one, following in pairwise(times)):
            raise InputError(
                f"clips are {self.clips}: give start, end, start, … in seconds, none before another"
            )


@dataclass(frozen=True)
class ChunkedOptions:
    """How the audio is cut into overlapping chunks."""

    chunk_length: float = 30.0
    """Seconds of a chunk; 15 to 25 is better for distilled models (paper table 20)."""
    stride: float | None = None
    """Seconds shared with the next chunk on each side; by default a sixth of the chunk."""

    @property
    def overlap(self) -> float:
        """The stride, or its default."""
        return self.chunk_length / 6 if self.stride is None else self.stride

    def __post_init__(self):
        if not 0 < self.chunk_length <= WINDOW_SECONDS:
            raise InputError(
                f"chunk_length is {self.chunk_length} s: use more than 0 and at most "
                f"{WINDOW_SECONDS} s, Whisper's window"
            )
        if not 0 <= 2 * self.overlap <= self.chunk_length - 0.01:  # at least a frame is left
            raise InputError(
                f"a stride of {self.overlap} s on both sides leaves nothing of a chunk of "
                f"{self.chunk_length} s: use less than {self.chunk_length / 2:g} s"
            )


@dataclass(frozen=True)
class VoiceOptions:
    """Voice-activity detection; times in seconds."""

    threshold: Annotated[float, arg(name="vad-threshold")] = 0.5
    """Probability of speech above which speech begins."""
    hysteresis: Annotated[float, arg(name="vad-hysteresis")] = 0.15
    """How far below the threshold the probability falls in a pause."""
    min_silence: Annotated[float, arg(name="vad-min-silence")] = 2.0
    """Shorter pauses are kept, in seconds."""
    min_speech: Annotated[float, arg(name="vad-min-speech")] = 0.1
    """Shorter speech is dropped, in seconds."""
    padding: Annotated[float, arg(name="vad-padding")] = 0.4
    """Seconds of sound that are kept before and after speech."""

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise InputError(f"the threshold of speech is {self.threshold}: use 0 to 1")
        for name in ("hysteresis", "min_silence", "min_speech", "padding"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: it must be a number from 0 on")


@dataclass(frozen=True)
class SubtitleLayout:
    """Layout of subtitles where words have times; by default a segment is a subtitle."""

    max_line_width: int | None = None
    """Most characters of a line."""
    max_line_count: int | None = None
    """Most lines of a subtitle; needs a width."""
    max_words_per_line: int | None = None
    """Most words of a line, where no width is given."""
    highlight_words: bool = False
    """Underline each word while it is spoken."""
