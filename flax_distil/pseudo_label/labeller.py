"""The teacher over a dataset, shard by shard; each is written when it is complete.

    dataset → shards of utterances → engine: this process, or Ray's actors → label store

Utterances keep their order. A batch never extends over the end of a shard, so a shard depends on
its own utterances alone and is the same, byte for byte, whichever process made it and whether or
not the run was killed in between.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice

import jax
from rich.console import Console

from flax_distil.config import PseudoLabelConfig
from flax_distil.data.utterances import Skipped, UtteranceStream
from flax_distil.data.windows import map_in_order
from flax_distil.errors import InputError
from flax_distil.files import remove_partial
from flax_distil.parallel.multihost import barrier, start
from flax_distil.pseudo_label.jobs import LabelJob, prepare
from flax_distil.pseudo_label.progress import (
    LabelProgress,
    LabelSummary,
    checking,
    reasons,
    summary_table,
)
from flax_distil.pseudo_label.ray_engine import start_engines
from flax_distil.pseudo_label.shards import Work, load_labellers
from flax_distil.pseudo_label.store import Shard

log = logging.getLogger(__name__)

# Labels the given shards, writes them to the store, and returns them in any order.
Engine = Callable[[Iterable[Work], LabelProgress], Iterator[Shard]]

A_WEEK = 7 * 24 * 3600.0  # hosts wait so long for the slowest; a dead one ends them within minutes


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
        labellers = load_labellers(config)
        jobs, engines = [one.job for one in labellers], [one.shards for one in labellers]
    summaries = []
    for job, engine in zip(jobs, engines, strict=True):
        summaries.append(label(job, engine, host, hosts))
        if host == 0:
            Console().print(summary_table(summaries[-1], job.store.address))
    total = sum(summaries[1:], summaries[0])
    if host == 0 and len(jobs) > 1:
        Console().print(summary_table(total, f"{len(jobs)} datasets"))
    return total


def label(job: LabelJob, engine: Engine, host: int = 0, hosts: int = 1) -> LabelSummary:
    """Make the shards of the job's store that are missing; of several hosts, each its own.

    A complete store is searched for clips that were skipped and can be decoded now; their shards
    are made again.

    Raises InputError where too many clips are skipped, or all.
    """
    begun, config, store = time.monotonic(), job.config, job.store
    store.remove_partial()
    if job.states:
        remove_partial(job.states)

    def ours(number: int) -> bool:
        return number % hosts == host

    done = store.finished(checking, verify=config.verify)
    made: dict[int, Shard] = {}
    complete = store.complete() and bool(done)
    again: set[int] = set()
    if complete:
        again = retryable(job, [shard for number, shard in done.items() if ours(number)])
        done = {number: shard for number, shard in done.items() if number not in again}
    if again or not (complete and job.count is None):  # else a complete stream is not read again
        earlier = [shard for number, shard in done.items() if ours(number)]
        total = job.count
        if total is not None and hosts > 1:
            total = sum(ours(position // config.shard_size) for position in range(total))
        with LabelProgress(total, config.max_skipped_share, earlier) as progress:
            for shard in engine(pending(job, done, ours), progress):
                made[shard.number] = shard
    if hosts > 1:
        barrier(f"labels in {store.address}", A_WEEK)
        done = store.finished(checking, made)
    shards = [shard for _, shard in sorted((done | made).items())]
    labelled_now = sum((shard.seconds for shard in made.values()), 0.0)
    summary = LabelSummary(tuple(shards), labelled_now, time.monotonic() - begun)
    if host == 0:
        store.remove_partial()
        store.write_index(shards, complete=True)
        lines = [
            json.dumps(dataclasses.asdict(clip), ensure_ascii=False) + "\n"
            for clip in summary.skipped
        ]
        store.write_file("skipped.jsonl", "".join(lines).encode())
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
        numbered = ((skipped[position], row) for position, row in some if position in skipped)
    else:
        numbered = ((number, rows[position]) for position, number in skipped.items())
    decoded = map_in_order(
        lambda one: (one[0], job.decode(one[1])),
        numbered,
        job.config.workers,
        ahead=2 * job.config.workers,
    )
    return {number for number, clips in decoded if not isinstance(clips, Skipped)}
