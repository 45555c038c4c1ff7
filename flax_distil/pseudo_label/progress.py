"""Progress of a labelling run, its limit on skipped clips, and its summary."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from tqdm import tqdm

from flax_distil.data.utterances import Skipped
from flax_distil.errors import InputError
from flax_distil.pseudo_label.store import Shard

# The limit where none was given: a tenth of the clips, but never fewer than 100.
SKIPPED_SHARE, SKIPPED_AT_LEAST = 0.1, 100
REASONS_SHOWN = 3
SKIPPED_SHOWN = 5


class LabelProgress:
    """A progress bar in seconds of audio, which ends a run that skips too many clips.

    total: utterances to label; None for a stream, whose skipped share is that of what was read.
    max_skipped_share: of the configuration. done: shards of earlier runs.
    """

    def __init__(self, total: int | None, max_skipped_share: float | None, done: Iterable[Shard]):
        done = list(done)
        self.total = total
        self.share = SKIPPED_SHARE if max_skipped_share is None else max_skipped_share
        self.least = SKIPPED_AT_LEAST if max_skipped_share is None else 0
        self.first = [clip for shard in done for clip in shard.skipped[:REASONS_SHOWN]]
        self.skipped = sum(len(shard.skipped) for shard in done)
        self.labels = sum(shard.rows for shard in done)
        # A window that was split has several labels, so `left` is approximate.
        self.left = None if total is None else max(total - self.labels - self.skipped, 0)
        self.utterances, self.seconds, self.start = 0, 0.0, time.monotonic()
        self.bar = tqdm(
            desc="labelling",
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
            if self.left
            else "{desc} [{elapsed}]",
            total=self.left,
        )

    def __enter__(self) -> "LabelProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, seconds: float, utterances: int) -> None:
        """Add seconds of audio from so many utterances to the bar."""
        self.utterances, self.seconds = self.utterances + utterances, self.seconds + seconds
        clock = tqdm.format_interval
        text = f"{clock(self.seconds)} of audio"
        if self.left and self.utterances:  # the total duration is an estimate
            estimate = self.seconds * self.left / self.utterances
            text = f"{clock(self.seconds)} of about {clock(estimate)}"
        if self.seconds:
            rtf = (time.monotonic() - self.start) / self.seconds
            text += f", RTF {rtf:.3f} ({1 / rtf:.1f}x)"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(utterances)

    def count(self, labels: int, skipped: Iterable[Skipped]) -> None:
        """Count the clips of a shard. Raises InputError where too many were skipped."""
        skipped = list(skipped)
        self.labels += labels
        self.skipped += len(skipped)
        self.first += skipped
        total = self.labels + self.skipped if self.total is None else self.total
        if self.skipped > max(self.share * total, self.least):
            raise InputError(
                f"{self.skipped} of {total} clips were skipped, and max_skipped_share is "
                f"{self.share:g}: repair the dataset or raise it; the first: {reasons(self.first)}"
            )


def reasons(skipped: Sequence[Skipped]) -> str:
    """The first few skipped clips with their reasons."""
    return "; ".join(f"{clip.id}: {clip.reason}" for clip in skipped[:REASONS_SHOWN])


def checking(files: Iterable) -> Iterable:
    """The files, with a progress bar."""
    return tqdm(files, desc="checking shards", leave=False)


@dataclass(frozen=True)
class LabelSummary:
    """The contents of label stores, and the speed of this run."""

    shards: tuple[Shard, ...]
    labelled_now: float
    """Seconds of audio labelled in this run."""
    wall: float
    """Seconds this run took."""

    def __add__(self, other: "LabelSummary") -> "LabelSummary":
        labelled_now, wall = self.labelled_now + other.labelled_now, self.wall + other.wall
        return LabelSummary(self.shards + other.shards, labelled_now, wall)

    @property
    def labels(self) -> int:
        """Labels, earlier runs included, as in all that follows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def seconds(self) -> float:
        """Seconds of labelled audio."""
        return sum(shard.seconds for shard in self.shards)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Clips without a label."""
        return tuple(clip for shard in self.shards for clip in shard.skipped)

    @property
    def reference_words(self) -> int:
        """Words or characters of the references, by `rate`."""
        return sum(shard.reference_words for shard in self.shards)

    @property
    def rate(self) -> str:
        """WER, CER or WER/CER: what `wer` is."""
        return (
            "/".join(sorted({name for s in self.shards for name in s.rates}, reverse=True)) or "WER"
        )

    @property
    def wer(self) -> float | None:
        """Error rate of all labels that have a reference, as a fraction."""
        errors = sum(shard.word_errors for shard in self.shards)
        return errors / self.reference_words if self.reference_words else None

    @property
    def rtf(self) -> float | None:
        """Real-time factor: seconds of work per second of audio; None if nothing was labelled."""
        return self.wall / self.labelled_now if self.labelled_now else None


def summary_table(summary: LabelSummary, title: str) -> Table:
    """The summary as two columns."""
    table = Table("", title, show_header=True)
    table.add_row("labels", f"{summary.labels:,}")
    table.add_row("audio", f"{summary.seconds / 3600:.2f} h")
    wer = "no references" if summary.wer is None else f"{100 * summary.wer:.2f} %"
    table.add_row(f"{summary.rate} against the references", wer)
    if summary.rtf is not None:
        table.add_row("real-time factor", f"{summary.rtf:.3f} ({1 / summary.rtf:.1f}x)")
    table.add_row("skipped", f"{len(summary.skipped):,}")
    for clip in summary.skipped[:SKIPPED_SHOWN]:
        table.add_row("", f"{clip.id}: {clip.reason}")
    if len(summary.skipped) > SKIPPED_SHOWN:
        table.add_row("", "… the others are in skipped.jsonl")
    return table
