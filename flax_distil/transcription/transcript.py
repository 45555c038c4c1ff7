"""Transcripts, with openai-whisper's names, and its file formats, character by character."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from flax_distil.decode.search import Acceptance
from flax_distil.options import SubtitleLayout

LONG_PAUSE = 3.0  # seconds between words that begin another subtitle
UNLIMITED = 1000  # characters or words in a line


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


def to_txt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def to_srt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """SubRip subtitles."""
    entries = cues(transcript, layout, lambda seconds: clock(seconds, "{:02d}:", ","))
    return "".join(f"{number}\n{cue}" for number, cue in enumerate(entries, 1))


def to_vtt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """WebVTT subtitles."""
    return "WEBVTT\n\n" + "".join(cues(transcript, layout, clock))


def to_tsv(transcript: Transcript, layout: SubtitleLayout) -> str:
    """A table of start and end in milliseconds, and text."""
    rows = ["start\tend\ttext\n"]
    for one in transcript.segments:
        text = one.text.strip().replace("\t", " ")
        rows.append(f"{round(1000 * one.start)}\t{round(1000 * one.end)}\t{text}\n")
    return "".join(rows)


def to_json(transcript: Transcript, layout: SubtitleLayout) -> str:
    """Text, segments and language."""
    return json.dumps(transcript.as_dict())


WRITERS: dict[str, Callable[[Transcript, SubtitleLayout], str]] = {
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


def cues(
    transcript: Transcript, layout: SubtitleLayout, at: Callable[[float], str]
) -> Iterator[str]:
    """All subtitles: the segments, or what `layout` makes of the words where they have times."""
    cue = lambda start, end, text: f"{at(start)} --> {at(end)}\n{text}\n\n"
    segments = transcript.segments
    if not segments or segments[0].words is None:
        for segment in segments:
            yield cue(segment.start, segment.end, segment.text.strip().replace("-->", "->"))
        return
    for words in subtitles(segments, layout):
        texts, last = [word.word for word in words], words[0].start
        if not layout.highlight_words:
            yield cue(last, words[-1].end, "".join(texts))
            continue
        for index, word in enumerate(words):  # a cue each, and one for each pause before
            if at(word.start) != at(last):
                yield cue(last, word.start, "".join(texts))
            underlined = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", word.word)
            parts = [*texts[:index], underlined, *texts[index + 1 :]]
            yield cue(word.start, word.end, "".join(parts))
            last = word.end


def subtitles(segments: Iterable[Segment], layout: SubtitleLayout) -> Iterator[list[Word]]:
    """Words of each subtitle, line breaks among them."""
    by_segment = layout.max_line_count is None or layout.max_line_width is None
    width, most = layout.max_line_width or UNLIMITED, layout.max_words_per_line or UNLIMITED
    subtitle: list[Word] = []
    filled, lines = 0, 1  # characters in the line, lines in the subtitle
    before = None
    numbered = (pair for segment in segments for pair in enumerate(segment.words or ()))
    for index, word in numbered:
        pause = not by_segment and before is not None and word.start - before > LONG_PAUSE
        breaks = index % most == 0 and bool(subtitle) and by_segment
        before = word.start
        if filled and filled + len(word.word) <= width and not pause and not breaks:
            filled += len(word.word)
        else:
            text = word.word.strip()
            filled_before, filled = filled, len(text)
            full = layout.max_line_count is not None and (pause or lines >= layout.max_line_count)
            if (subtitle and full) or breaks:
                yield subtitle
                subtitle, lines = [], 1
            elif filled_before:
                lines, text = lines + 1, "\n" + text
            word = replace(word, word=text)
        subtitle.append(word)
    if subtitle:
        yield subtitle
