"""The teacher over a dataset, shard by shard; each is written when it is complete.

    dataset → shards of utterances → engine: this process, or Ray's actors → label store

Utterances keep their order. A batch never extends over the end of a shard, so a shard depends on
its own utterances alone and is the same, byte for byte, whichever process made it and whether or
not the run was killed in between.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.utterances import Skipped, UtteranceStream
from flax_distil.data.workers import map_in_order
from flax_distil.errors import InputError
from flax_distil.files import remove_partial
from flax_distil.parallel.multihost import barrier, start
from flax_distil.pseudo_label.jobs import LabelJob, prepare
from flax_distil.pseudo_label.ray_engine import start_engines
from flax_distil.pseudo_label.shards import LabelProgress, Work, decode, label_shards
from flax_distil.pseudo_label.store import Shard
from flax_distil.pseudo_label.teacher import Teacher, load_teacher

log = logging.getLogger(__name__)

# Labels the given shards, writes them to the store, and returns them in any order.
Engine = Callable[[Iterable[Work], LabelProgress], Iterator[Shard]]

A_WEEK = 7 * 24 * 3600.0  # hosts wait so long for the slowest; a dead one ends them within minutes
# The limit of skipped clips where none was given: a tenth, but never fewer than 100.
SKIPPED_SHARE, SKIPPED_AT_LEAST = 0.1, 100
REASONS_SHOWN = 3
checking = partial(tqdm, desc="checking shards", leave=False)
SKIPPED_SHOWN = 5


@dataclass(frozen=True)
class LabelSummary:
    """The contents of label stores, those of earlier runs included, and the speed of this run."""

    shards: tuple[Shard, ...]
    labels: int
    seconds: float
    """Seconds of labelled audio."""
    skipped: tuple[Skipped, ...]
    """Clips without a label."""
    reference_words: int
    """Words or characters of the references, by `rate`."""
    wer: float | None
    """Error rate of all labels that have a reference, as a fraction."""
    rate: str
    """WER, CER or WER/CER: what `wer` is."""
    labelled_now: float
    """Seconds of audio labelled in this run."""
    wall: float
    """Seconds this run took."""

    @property
    def rtf(self) -> float | None:
        """Real-time factor: seconds of work per second of audio; None if nothing was labelled."""
        return self.wall / self.labelled_now if self.labelled_now else None


def run(config: PseudoLabelConfig) -> LabelSummary:
    """Label `config.data` with `config.model`; resumes a run that was killed.

    Several datasets are labelled one after the other, each into a store of its own. The work is
    shared by shards: between the actors of a Ray cluster with `engine="ray"`, else between the
    hosts that were started together, by `number % hosts`.

    Raises InputError for a dataset or teacher that cannot be used, and for a store that was begun
    with other settings.
    """
    host, hosts = 0, 1
    if config.engine == "ray":  # actors take the accelerators, this process none
        jobs, _ = prepare(config)
        engines: Sequence[Engine] = start_engines(config, partial(load_labellers, config), jobs)
    else:
        start()
        host, hosts = jax.process_index(), jax.process_count()
        jobs, teacher = load_labellers(config)
        engines = [partial(label_shards, job, teacher) for job in jobs]
    summaries = []
    for job, engine in zip(jobs, engines, strict=True):
        summaries.append(label(job, engine, host, hosts))
        if host == 0:
            Console().print(summary_table(summaries[-1], job.store.address))
    total = summarise(
        [shard for one in summaries for shard in one.shards],
        sum(one.labelled_now for one in summaries),
        sum(one.wall for one in summaries),
    )
    if host == 0 and len(jobs) > 1:
        Console().print(summary_table(total, f"{len(jobs)} datasets"))
    return total


def load_labellers(config: PseudoLabelConfig) -> tuple[list[LabelJob], Teacher]:
    """A job for each dataset, and the teacher for all. Raises what `prepare` raises."""
    jobs, checkpoint = prepare(config)
    return jobs, load_teacher(config, checkpoint)


def label(job: LabelJob, engine: Engine, host: int = 0, hosts: int = 1) -> LabelSummary:
    """Make the shards of the job's store that are missing; of several hosts, each its own.

    Shards with a clip that was skipped and can be decoded now are made again.

    Raises InputError where too many clips are skipped, or all.
    """
    begun, config, store = time.monotonic(), job.config, job.store

    def ours(number: int) -> bool:
        return number % hosts == host

    store.remove_partial()
    if job.states:
        remove_partial(job.states)
    done = store.finished(checking, verify=config.verify)
    complete = store.complete() and bool(done)
    made: dict[int, Shard] = {}
    again: set[int] = set()
    if complete or job.count is not None:
        again = retryable(job, [shard for number, shard in done.items() if ours(number)])
        done = {number: shard for number, shard in done.items() if number not in again}
    if again or not (complete and job.count is None):  # else a complete stream is not read again
        earlier = [shard for number, shard in done.items() if ours(number)]
        total = left = job.count
        if total is not None:
            total = sum(ours(number // config.shard_size) for number in range(total))
            left = max(total - sum(shard.utterances for shard in earlier), 0)
        if not complete:
            check_skipped(config, earlier, total)
        with LabelProgress(desc="labelling", total=left, unit=" clips") as progress:
            for shard in engine(pending(job, done, ours), progress):
                made[shard.number] = shard
                check_skipped(config, [*earlier, *made.values()], total)
    if hosts > 1:
        barrier(f"labels in {store.address}", A_WEEK)
        done = store.finished(checking, made)
    shards = [shard for _, shard in sorted((done | made).items())]
    labelled_now = sum(shard.seconds for shard in made.values())
    summary = summarise(shards, labelled_now, time.monotonic() - begun)
    if host == 0:
        store.remove_partial()
        store.write_index(shards, complete=True)
        skipped = [json.dumps(vars(clip), ensure_ascii=False) + "\n" for clip in summary.skipped]
        store.write_file("skipped.jsonl", "".join(skipped).encode())
    if not summary.labels:
        raise InputError(
            f"none of {len(summary.skipped)} clips could be labelled; the first: "
            f"{reasons(summary.skipped)}"
        )
    return summary


def pending(
    job: LabelJob, done: Mapping[int, Shard], ours: Callable[[int], bool]
) -> Iterator[Work]:
    """The shards that are not done, with their utterances, in order."""
    size = job.config.shard_size
    known = max(done, default=-1) + 1 if job.count is None else -(-job.count // size)
    for number in range(known):
        if ours(number) and number not in done:
            yield number, job.shard(number)
    if job.count is None:  # what comes after the known shards of a stream
        rest = enumerate(job.utterances.iter_from(known * size), known * size)
        for number, rows in groupby(rest, lambda numbered: numbered[0] // size):
            if ours(number):
                yield number, (utterance for _, utterance in rows)


def retryable(job: LabelJob, shards: Iterable[Shard]) -> set[int]:
    """Numbers of the shards with a skipped clip that can be decoded now.

    A stream is read from the first to the last skipped clip for it.
    """
    skipped = {position: shard.number for shard in shards for position in shard.skipped_numbers}
    if not skipped:
        return set()
    rows = job.utterances
    if isinstance(rows, UtteranceStream):
        log.info("%s is read again for %d skipped clips", job.config.data.source, len(skipped))
        first = min(skipped)
        some = islice(enumerate(rows.iter_from(first), first), max(skipped) - first + 1)
        numbered = ((position, row) for position, row in some if position in skipped)
    else:
        numbered = ((position, rows[position]) for position in skipped)
    workers = job.config.workers
    decoded = map_in_order(
        lambda one: (skipped[one[0]], decode(job, *one)), numbered, workers, ahead=2 * workers
    )
    return {number for number, clips in decoded if not isinstance(clips, Skipped)}


def check_skipped(config: PseudoLabelConfig, shards: Sequence[Shard], total: int | None) -> None:
    """Raises InputError where too many of `total` clips, or of those in `shards`, were skipped."""
    skipped = sum(len(shard.skipped) for shard in shards)
    total = sum(shard.utterances for shard in shards) if total is None else total
    share, least = config.max_skipped_share, 0
    if share is None:
        share, least = SKIPPED_SHARE, SKIPPED_AT_LEAST
    if skipped > max(share * total, least):
        first = [clip for shard in shards for clip in shard.skipped]
        raise InputError(
            f"{skipped} of {total} clips were skipped, and max_skipped_share is {share:g}: repair "
            f"the dataset or raise it; the first: {reasons(first)}"
        )


def reasons(skipped: Sequence[Skipped]) -> str:
    """The first few skipped clips with their reasons."""
    return "; ".join(f"{clip.id}: {clip.reason}" for clip in skipped[:REASONS_SHOWN])


def summarise(shards: Sequence[Shard], labelled_now: float, wall: float) -> LabelSummary:
    """The totals of shards."""
    words = sum(shard.reference_words for shard in shards)
    rates = {rate for shard in shards for rate in shard.rates}
    return LabelSummary(
        shards=tuple(shards),
        labels=sum(shard.rows for shard in shards),
        seconds=float(sum(shard.seconds for shard in shards)),
        skipped=tuple(clip for shard in shards for clip in shard.skipped),
        reference_words=words,
        wer=sum(shard.word_errors for shard in shards) / words if words else None,
        rate="/".join(sorted(rates, reverse=True)) or "WER",
        labelled_now=float(labelled_now),
        wall=wall,
    )


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
