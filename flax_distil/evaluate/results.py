"""What models returned: one line a clip and one line a batch, kept on disk while it is measured.

    OUTPUT_DIR/results/settings.json    what the lines below are the results of
                       clips.jsonl      a `ClipResult` a line, without times: the same every time
                       batches.jsonl    a `BatchTime` a line, the last line of its batch

A killed evaluation continues after its last whole batch.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flax_distil.errors import InputError, writing
from flax_distil.files import write_whole

Test = Literal["short", "long", "non-speech", "noise", "prompt"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a model returned for a clip; None where its library does not tell."""

    text: str
    tokens: int | None = None
    """Of the text, without the end of text."""
    ended: bool | None = None
    """Whether the model ended the text, rather than being cut at `max_tokens`."""
    mean_log_probability: float | None = None
    no_speech_probability: float | None = None
    compression_ratio: float | None = None
    detected: str | None = None
    """The likeliest language where none is given."""


class Part(NamedTuple):
    """A part of an evaluation: all clips of a dataset under one condition."""

    test: Test
    setting: str
    """Such as "white noise at 10 dB"; "" where a test has one setting."""
    dataset: str


@dataclass(frozen=True, kw_only=True)
class OfPart:
    """What belongs to a part of the evaluation."""

    test: Test
    setting: str
    dataset: str

    @property
    def part(self) -> Part:
        """The part of the evaluation that it belongs to."""
        return Part(self.test, self.setting, self.dataset)


@dataclass(frozen=True, kw_only=True)
class ClipResult(Output, OfPart):
    """One model on one clip."""

    id: str
    speaker: str | None
    model: str
    language: str
    seconds: float
    """Of audio."""
    reference: str


@dataclass(frozen=True, kw_only=True)
class BatchTime(OfPart):
    """Seconds that each model took for the clips of one batch, log-mel included."""

    clips: int
    audio_seconds: float
    windows: int
    seconds: dict[str, float]


@dataclass
class Results:
    """All results of an evaluation, appended to files batch by batch where there is a folder."""

    folder: Path | None = None
    clips: list[ClipResult] = field(default_factory=list)
    batches: list[BatchTime] = field(default_factory=list)
    resumed: Counter[Part] = field(default_factory=Counter)
    """Batches of each part that an earlier run finished."""

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], overwrite: bool = False) -> "Results":
        """The results in `folder`, up to the last whole batch, to be continued.

        Raises:
            InputError: they are of other settings, or the folder cannot be written.
        """
        results = cls(folder)
        text = json.dumps(settings, indent=1, ensure_ascii=False, sort_keys=True, default=str)
        path = folder / "settings.json"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_file() and not overwrite:
                if path.read_text(encoding="utf-8", errors="surrogateescape") != text:
                    raise InputError(
                        f"{folder} holds results of other models, datasets or options: choose "
                        "another --output-dir, or replace them with --overwrite"
                    )
                results.batches = [
                    BatchTime(**line) for line in whole_lines(folder / "batches.jsonl")
                ]
                wanted = sum(batch.clips * len(batch.seconds) for batch in results.batches)
                lines = whole_lines(folder / "clips.jsonl", wanted)
                results.clips = [ClipResult(**line) for line in lines]
                results.resumed = Counter(batch.part for batch in results.batches)
            else:
                for name in ("clips.jsonl", "batches.jsonl"):
                    (folder / name).unlink(missing_ok=True)
                write_whole(path, text.encode(errors="surrogateescape"))
        return results

    def add(self, clips: Sequence[ClipResult], batch: BatchTime) -> None:
        """Add the results of all models on one batch."""
        self.clips += clips
        self.batches.append(batch)
        if self.folder is not None:
            with writing(self.folder):
                append(self.folder / "clips.jsonl", clips)
                append(self.folder / "batches.jsonl", [batch])


def append(path: Path, records: Iterable[Any]) -> None:
    """Append records to a JSONL file, and wait until they are on the disk."""
    with path.open("ab") as file:
        for one in records:
            line = json.dumps(asdict(one), ensure_ascii=False, sort_keys=True) + "\n"
            file.write(line.encode(errors="backslashreplace"))  # names may hold any bytes
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` lines of a JSONL file, which is cut behind the last one that is whole."""
    if not path.is_file():
        return []
    lines, size = [], 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or len(lines) == limit:
                break
            lines.append(json.loads(line))
            size += len(line)
        file.truncate(size)
    return lines
