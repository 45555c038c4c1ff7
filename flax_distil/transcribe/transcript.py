"""Transcripts, with openai-whisper's names, and its file formats, character by character."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from flax_distil.decode.search import Acceptance


@dataclass(frozen=True)
class Word:
    """A word with the space before it, and its seconds from the start of the audio."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True)
class Segment:
    """A stretch of speech. Times are seconds from the start of the audio."""

    id: int
    seek: int
    """First frame of its window, in frames of 10 ms."""
    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float
    """Mean log-probability of the window's tokens."""
    compression_ratio: float
    no_speech_prob: float
    words: tuple[Word, ...] | None = None
    """Only where word timestamps were asked for."""


@dataclass(frozen=True)
class Transcript:
    """The whole text, its segments, and the code of the language."""

    text: str
    segments: tuple[Segment, ...]
    language: str
    acceptance: Acceptance | None = None
    """Of the assistant's draft tokens, where one was used."""

    def as_dict(self) -> dict[str, Any]:
        """The dictionary that openai-whisper's `transcribe` returns."""
        result = asdict(replace(self, acceptance=None))
        del result["acceptance"]
        for segment in result["segments"]:
            if segment["words"] is None:
                del segment["words"]
        return result


def to_txt(transcript: Transcript) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def to_srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    entries = enumerate(cues(transcript, lambda seconds: clock(seconds, "{:02d}:", ",")), 1)
    return "".join(f"{number}\n{cue}" for number, cue in entries)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles."""
    return "WEBVTT\n\n" + "".join(cues(transcript, clock))


def to_tsv(transcript: Transcript) -> str:
    """A table of start and end in milliseconds, and text."""
    rows = ["start\tend\ttext\n"]
    for one in transcript.segments:
        text = one.text.strip().replace("\t", " ")
        rows.append(f"{round(1000 * one.start)}\t{round(1000 * one.end)}\t{text}\n")
    return "".join(rows)


def to_json(transcript: Transcript) -> str:
    """Text, segments and language."""
    return json.dumps(transcript.as_dict())


WRITERS: dict[str, Callable[[Transcript], str]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "tsv": to_tsv,
    "json": to_json,
}


def clock(seconds: float, hours: str = "", decimal_mark: str = ".") -> str:
    """Hours, minutes, seconds and milliseconds; hours only where `hours` formats them or there are
    any."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hour, minutes = divmod(minutes, 60)
    before = (hours or "{:02d}:").format(hour) if hours or hour else ""
    whole, thousandths = divmod(milliseconds, 1000)
    return f"{before}{minutes:02d}:{whole:02d}{decimal_mark}{thousandths:03d}"


def cues(transcript: Transcript, at: Callable[[float], str]) -> Iterator[str]:
    """A subtitle for each segment, from its first to its last word where words have times."""
    for segment in transcript.segments:
        if segment.words is None:
            start, end = segment.start, segment.end
            text = segment.text.strip().replace("-->", "->")
        elif segment.words:
            start, end = segment.words[0].start, segment.words[-1].end
            text = "".join(word.word for word in segment.words).strip()
        else:
            continue
        yield f"{at(start)} --> {at(end)}\n{text}\n\n"
