"""How far labelling is, and what it came to."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from tqdm import tqdm

from flax_distil.data.packing import Packed
from flax_distil.data.utterances import Skipped, Utterances, UtteranceStream
from flax_distil.pseudo_label.store import Shard


@dataclass(frozen=True)
class LabelSummary:
    """What a label store holds, and how fast this run was."""

    labels: int
    seconds: float
    """Of labelled audio, earlier runs included."""
    word_errors: int
    reference_words: int
    rate: str
    """WER, CER or both: whether these two count words or characters."""
    skipped: tuple[Skipped, ...]
    labelled_now: float
    """Seconds of audio labelled in this run."""
    wall: float
    """Seconds this run took."""

    @property
    def wer(self) -> float | None:
        """Of all labels that have a reference, as a fraction; of characters where `rate` says."""
        return self.word_errors / self.reference_words if self.reference_words else None

    @property
    def rtf(self) -> float | None:
        """Real-time factor: seconds of work a second of audio; None when all was there already."""
        return self.wall / self.labelled_now if self.labelled_now else None


def together(summaries: Sequence[LabelSummary]) -> LabelSummary:
    """One summary of several stores."""
    first, *rest = summaries
    for one in rest:
        rates = {*first.rate.split("/"), *one.rate.split("/")}
        first = LabelSummary(
            labels=first.labels + one.labels,
            seconds=first.seconds + one.seconds,
            word_errors=first.word_errors + one.word_errors,
            reference_words=first.reference_words + one.reference_words,
            rate="/".join(sorted(rates, reverse=True)),
            skipped=first.skipped + one.skipped,
            labelled_now=first.labelled_now + one.labelled_now,
            wall=first.wall + one.wall,
        )
    return first


def progress(files: Iterable) -> Iterable:
    """Shows how far the checking of shards has come."""
    return tqdm(files, desc="checking shards", leave=False)


class AudioBar:
    """Progress in audio time: how much was heard, how fast, and how long it still takes."""

    def __init__(self, utterances: Utterances | UtteranceStream | Packed, done: Iterable[Shard]):
        total = None if isinstance(utterances, UtteranceStream) else len(utterances)
        # A window that was split has several labels.
        made = sum(shard.utterances for shard in done)
        self.left = None if total is None else max(total - made, 0)
        self.heard, self.seconds, self.start = 0, 0.0, time.monotonic()
        self.bar = tqdm(
            desc="labelling",
            bar_format="{percentage:3.0f}%|{bar}| {desc} [{elapsed}<{remaining}]"
            if self.left
            else "{desc} [{elapsed}]",
            total=self.left,
        )

    def __enter__(self) -> "AudioBar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, seconds: float, utterances: int) -> None:
        """So many more seconds of audio, from so many utterances."""
        self.heard, self.seconds = self.heard + utterances, self.seconds + seconds
        clock = tqdm.format_interval
        text = f"{clock(self.seconds)} of audio"
        if self.left and self.heard:  # the whole is not known before it was heard
            text = f"{clock(self.seconds)} of about {clock(self.seconds * self.left / self.heard)}"
        if self.seconds:
            rtf = (time.monotonic() - self.start) / self.seconds
            text += f", RTF {rtf:.3f} ({1 / rtf:.1f}x)"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(utterances)


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
    for clip in summary.skipped[:5]:
        table.add_row("", f"{clip.id}: {clip.reason}")
    if len(summary.skipped) > 5:
        table.add_row("", "… the others are in skipped.jsonl")
    return table
