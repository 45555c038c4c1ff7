"""Text that Whisper makes up over silence: what looks unlike speech between two pauses is dropped,
and the silence is passed over (openai-whisper's `hallucination_silence_threshold`).
"""

from collections.abc import Sequence

from flax_distil.model.dims import CHUNK_SECONDS
from flax_distil.transcribe.result import Segment, Word
from flax_distil.transcribe.words import APPENDED, PREPENDED

IMPROBABLE = 0.15  # a word's probability below which it counts as odd
SHORT, LONG = 0.133, 2.0  # seconds of a word that is odd
SHORT_WEIGHT = 15.0  # oddness of each second that a word is too short
JUDGED = 8  # words of a segment that are looked at
ODD = 3.0  # oddness of a segment that nobody said; one as odd as it has words is no better
EDGE = 2.0  # seconds at a window's edges that count as silence


def drop_made_up(
    segments: Sequence[Segment],
    threshold: float,
    start: float,
    end: float,
    recording_end: float,
    last_speech: float,
) -> tuple[list[Segment], float | None, bool]:
    """(segments to believe, seconds at which to go on where that changes, whether it was read).

    A window that begins with a pause and then with something odd counts as not read: the next one
    begins behind the pause, and may hear it rightly.

    segments: of one window, with words. threshold: seconds of silence that are worth skipping.
    start, end: seconds of the window. last_speech: when the last word before it ended.
    """
    spoken = [(place, one) for place, one in enumerate(segments) if one.words]
    if spoken and made_up(first := spoken[0][1]) and first.start - start > threshold:
        return [], first.start, False
    for index, (place, segment) in enumerate(spoken):
        following = spoken[index + 1][1] if index + 1 < len(spoken) else None
        if made_up(segment):
            silent_before = (
                segment.start - last_speech > threshold
                or segment.start < threshold
                or segment.start - start < EDGE
            )
            next_word = following.words[0].start if following and following.words else end
            silent_after = (
                next_word - segment.end > threshold
                or (following is not None and made_up(following))
                or start + CHUNK_SECONDS - segment.end < EDGE
            )
            if silent_before and silent_after:
                last = recording_end - segment.end < threshold
                go_on = recording_end if last else max(start + 1, segment.start)
                return list(segments[:place]), go_on, True
        last_speech = segment.end
    return list(segments), None, True


def made_up(segment: Segment) -> bool:
    """Whether a segment's first words are too improbable, too short or too long for speech."""
    words = [one for one in segment.words or () if one.word not in PREPENDED + APPENDED][:JUDGED]
    odd = sum(map(oddness, words))
    return odd >= ODD or odd + 0.01 >= len(words)


def oddness(word: Word) -> float:
    """0 for a word as people say them; 1 and more for one that hardly anybody said."""
    seconds = word.end - word.start
    improbable = float(word.probability < IMPROBABLE)
    return improbable + max(SHORT - seconds, 0) * SHORT_WEIGHT + max(seconds - LONG, 0)
