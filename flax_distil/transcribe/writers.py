"""Transcripts as text files: the formats of openai-whisper, character by character."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from flax_distil.options import SubtitleLayout
from flax_distil.transcribe.result import Segment, Transcript, Word

LONG_PAUSE = 3.0  # seconds between words that begin another subtitle
UNLIMITED = 1000  # characters or words in a line
FormatTime = Callable[[float], str]
Cue = tuple[str, str, str]  # start, end, text


def to_txt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def to_srt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """SubRip subtitles."""
    entries = cues(transcript, layout, lambda seconds: clock(seconds, "{:02d}:", ","))
    return "".join(
        f"{number}\n{start} --> {end}\n{text}\n\n"
        for number, (start, end, text) in enumerate(entries, 1)
    )


def to_vtt(transcript: Transcript, layout: SubtitleLayout) -> str:
    """WebVTT subtitles."""
    entries = cues(transcript, layout, clock)
    return "WEBVTT\n\n" + "".join(f"{start} --> {end}\n{text}\n\n" for start, end, text in entries)


def to_tsv(transcript: Transcript, layout: SubtitleLayout) -> str:
    """A table of start and end in milliseconds, and text."""
    rows = (
        f"{round(1000 * one.start)}\t{round(1000 * one.end)}\t"
        + one.text.strip().replace("\t", " ")
        + "\n"
        for one in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


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
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hour, minutes = divmod(minutes, 60)
    before = (hours or "{:02d}:").format(hour) if hours or hour else ""
    whole, thousandths = divmod(milliseconds, 1000)
    return f"{before}{minutes:02d}:{whole:02d}{decimal_mark}{thousandths:03d}"


def cues(transcript: Transcript, layout: SubtitleLayout, at: FormatTime) -> Iterator[Cue]:
    """All subtitles."""
    segments = transcript.segments
    if not segments or segments[0].words is None:
        for segment in segments:
            text = segment.text.strip().replace("-->", "->")
            yield at(segment.start), at(segment.end), text
        return
    for words in subtitles(segments, layout):
        text = "".join(word.word for word in words)
        if layout.highlight_words:
            yield from highlighted(words, text, at)
        else:
            yield at(words[0].start), at(words[-1].end), text


def highlighted(words: list[Word], text: str, at: FormatTime) -> Iterator[Cue]:
    """One cue a word, which is underlined; one without underline for each pause."""
    last = at(words[0].start)
    for index, word in enumerate(words):
        start, end = at(word.start), at(word.end)
        if start != last:
            yield last, start, text
        underlined = re.sub(r"^(\s*)(.*)$", r"\1<u>\2</u>", word.word)
        parts = [underlined if place == index else one.word for place, one in enumerate(words)]
        yield start, end, "".join(parts)
        last = end


def subtitles(segments: Iterable[Segment], layout: SubtitleLayout) -> Iterator[list[Word]]:
    """Words of each subtitle, line breaks among them."""
    by_segment = layout.max_line_count is None or layout.max_line_width is None
    width, most = layout.max_line_width or UNLIMITED, layout.max_words_per_line or UNLIMITED
    subtitle: list[Word] = []
    filled, lines = 0, 1  # characters in the line, lines in the subtitle
    before = None
    for index, word in groups(segments, most):
        before = word.start if before is None else before
        pause = not by_segment and word.start - before > LONG_PAUSE
        breaks = index == 0 and bool(subtitle) and by_segment
        fits = filled + len(word.word) <= width
        before = word.start
        if filled and fits and not pause and not breaks:
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


def groups(segments: Iterable[Segment], most: int) -> Iterator[tuple[int, Word]]:
    """All words with their place among at most `most` of one segment."""
    for segment in segments:
        for index, word in enumerate(segment.words or ()):
            yield index % most, word
