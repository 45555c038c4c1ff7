"""Transcripts to text: the formats of openai-whisper, character by character."""

import json
from collections.abc import Callable
from dataclasses import asdict

from flax_distil.transcribe.result import Transcript


def to_txt(transcript: Transcript) -> str:
    """One segment a line."""
    return "".join(f"{segment.text.strip()}\n" for segment in transcript.segments)


def to_json(transcript: Transcript) -> str:
    """Text, segments and language."""
    return json.dumps(asdict(transcript))


WRITERS: dict[str, Callable[[Transcript], str]] = {"txt": to_txt, "json": to_json}
