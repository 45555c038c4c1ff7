"""Clips that get no label: how many may be, and which could have one by now."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from flax_distil.data.packing import Packed
from flax_distil.data.utterances import Skipped, Utterance, Utterances, UtteranceStream
from flax_distil.data.windows import map_in_order
from flax_distil.errors import InputError
from flax_distil.pseudo_label.store import Shard

# Skipped clips that stop a run, where nothing else was asked for.
SKIPPED_SHARE, SKIPPED_AT_LEAST = 0.1, 100
REASONS_SHOWN = 3


class SkipLimit:
    """How many clips of a dataset may be skipped, and how many were.

    Of a stream, whose end is not known, the share is that of what was read.
    """

    def __init__(
        self,
        utterances: Utterances | UtteranceStream | Packed,
        share: float | None,
        done: Iterable[Shard],
    ):
        self.total = None if isinstance(utterances, UtteranceStream) else len(utterances)
        self.share = SKIPPED_SHARE if share is None else share
        self.least = SKIPPED_AT_LEAST if share is None else 0
        self.first: list[Skipped] = []
        self.skipped = self.labelled = 0
        for shard in done:
            self.first += shard.skipped[:REASONS_SHOWN]
            self.skipped += len(shard.skipped)
            self.labelled += shard.rows

    def add(self, clip: Skipped) -> None:
        """One more clip that was skipped. Raises InputError where it is one too many."""
        self.skipped += 1
        self.first.append(clip)
        if self.total is not None:
            self._check(self.total)

    def read(self, labelled: int) -> None:
        """So many more clips were labelled. Raises InputError as `add` does."""
        self.labelled += labelled
        if self.total is None:
            self._check(self.labelled + self.skipped)

    def _check(self, of: int) -> None:
        if self.skipped > max(self.share * of, self.least):
            raise InputError(
                f"{self.skipped} of {of} clips were skipped, and max_skipped_share is "
                f"{self.share:g}: mend the dataset or raise it; the first: {reasons(self.first)}"
            )


def reasons(skipped: Sequence[Skipped]) -> str:
    """The first few clips that were skipped, and why."""
    return "; ".join(f"{clip.id}: {clip.reason}" for clip in skipped[:REASONS_SHOWN])


def readable_now(
    utterances: Utterances | Packed,
    done: Mapping[int, Shard],
    listen_to: Callable[[Utterance], Skipped | list],
    workers: int,
) -> dict[int, Shard]:
    """The shards with a clip that was skipped and would not be any more."""
    numbered = [(shard, clip) for shard in done.values() for clip in shard.skipped_numbers]
    numbered = [(shard, clip) for shard, clip in numbered if clip < len(utterances)]
    heard = map_in_order(
        lambda one: (one[0], listen_to(utterances[one[1]])), numbered, workers, ahead=2 * workers
    )
    return {shard.number: shard for shard, clip in heard if not isinstance(clip, Skipped)}
