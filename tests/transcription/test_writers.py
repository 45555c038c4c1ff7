"""The formats against openai-whisper's writers, character by character."""

import io
import json

import numpy as np
import pysubs2
import pytest
import whisper.utils

from flax_distil.options import SubtitleLayout
from flax_distil.transcription.transcript import WRITERS, Segment, Transcript, Word, clock


def transcript(words: bool) -> Transcript:
    """Segments over two hours, with signs that formats have to mind, and with pauses."""
    texts = [" Hallo, wie geht's?", " Grüß\t«dich» --> dort.", "", " Ja.", " Eins zwei drei vier."]
    starts = [0.0, 5.28, 9.0, 3599.9996, 7300.123]
    segments = []
    for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
        parts = [f" {part}" for part in text.split()]
        times = start + np.cumsum([0, *(0.3 + 0.01 * len(part) for part in parts)])
        known = tuple(
            Word(part, float(times[i]), float(times[i + 1]) - 0.1 * (i % 2), 0.5)
            for i, part in enumerate(parts)
        )
        found = known if words else None
        segments.append(
            Segment(number, 0, start, start + 2.5, text, (1, 2), 0.2, -0.3, 1.1, 0.01, found)
        )
    return Transcript("".join(texts), tuple(segments), "de")


def theirs(extension: str, made: Transcript, **layout) -> str:
    file = io.StringIO()
    result = json.loads(json.dumps(made.as_dict()))
    whisper.utils.get_writer(extension, ".").write_result(result, file, **layout)
    return file.getvalue()


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("extension", WRITERS)
def test_files_equal_those_of_openai(extension, words):
    for made in (transcript(words), Transcript("", (), "en")):
        assert WRITERS[extension](made, SubtitleLayout()) == theirs(extension, made)


@pytest.mark.parametrize("extension", ["srt", "vtt"])
@pytest.mark.parametrize(
    "layout",
    [
        dict(highlight_words=True),
        dict(max_words_per_line=2),
        dict(max_words_per_line=3, highlight_words=True),
        dict(max_line_width=9),
        dict(max_line_width=9, max_line_count=1),
        dict(max_line_width=14, max_line_count=2, highlight_words=True),
        dict(max_line_count=2),
    ],
)
def test_words_are_set_as_openai_sets_them(extension, layout):
    made = transcript(True)
    assert WRITERS[extension](made, SubtitleLayout(**layout)) == theirs(extension, made, **layout)


@pytest.mark.parametrize("seconds", [0, 0.0004, 0.9996, 59.9999, 3599.9996, 3600, 363_599.999])
def test_the_clock_is_openai_s(seconds):
    assert clock(seconds) == whisper.utils.format_timestamp(seconds)
    assert clock(seconds, "{:02d}:", ",") == whisper.utils.format_timestamp(seconds, True, ",")


@pytest.mark.parametrize("extension", ["srt", "vtt"])
@pytest.mark.parametrize(
    "layout", [SubtitleLayout(), SubtitleLayout(max_line_width=14, max_line_count=2)]
)
def test_a_subtitle_library_reads_what_is_written(extension, layout):
    """pysubs2 finds every text, in segments at its time."""
    made = transcript(words=layout != SubtitleLayout())
    read = pysubs2.SSAFile.from_string(WRITERS[extension](made, layout), format_=extension)
    found = [(cue.start, cue.end, cue.plaintext) for cue in read if cue.plaintext]
    at = lambda seconds: round(1000 * seconds)
    if layout == SubtitleLayout():
        assert found == [
            (at(one.start), at(one.end), one.text.strip().replace("-->", "->"))
            for one in made.segments
            if one.text
        ]
    words = " ".join(text for *_, text in found).replace("-->", "->").split()
    assert words == made.text.replace("-->", "->").split()
