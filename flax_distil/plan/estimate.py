"""From a compiled program to what it takes: memory, traffic, and the least time a chip needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from flax_distil.plan.compiler import Compiled, Refusal
from flax_distil.plan.hlo import Collective, Held
from flax_distil.plan.programs import Program
from flax_distil.plan.topology import Chip, Slice


class Seconds(NamedTuple):
    """The least time of one run by what limits it, each alone: the roofline."""

    compute: float
    memory: float | int
    network: float

    @property
    def bound(self) -> float:
        """All three perfectly overlapped."""
        return max(self)

    @property
    def limit(self) -> str:
        """What the bound comes from."""
        return self._fields[self.index(self.bound)]


@dataclass(frozen=True)
class Estimate:
    """What one program takes on a chip of a slice.

    chips: those that it runs on. vocabulary: of its model. largest_batch: clips of a chip at a time
    that fit, if they were searched.
    """

    program: Program
    answer: Compiled
    target: Slice
    chips: int
    vocabulary: int
    largest_batch: int | None = None

    @property
    def seconds(self) -> Seconds:
        flops, answer = self.program.flops / self.chips, self.answer
        chip = self.target.chip
        return roofline(flops, answer.traffic, answer.collectives, chip, self.chips)

    @property
    def mfu(self) -> float:
        """The share of the peak that the bound allows."""
        return self.seconds.compute / self.seconds.bound

    @property
    def intensity(self) -> float:
        """Useful FLOPs for a byte of HBM traffic."""
        return self.program.flops / self.chips / self.answer.traffic

    @property
    def tensors(self) -> list[tuple[str, Held]]:
        """The largest arrays that the program makes in HBM, behind what makes each smaller."""
        return [
            (knob(held.shape, held.where, self.program, self.vocabulary), held)
            for held in self.answer.tensors[:5]
        ]


@dataclass(frozen=True)
class TooLarge:
    """A program that does not fit.

    fitting: the same program with the most clips at a time that fit; None where not even one does.
    """

    program: Program
    answer: Refusal
    chips: int
    fitting: Estimate | None

    @property
    def largest_batch(self) -> int | None:
        """Clips a chip at a time with which it fits."""
        return self.fitting and self.fitting.program.rows


def roofline(
    flops: float | int,
    traffic: float | int,
    collectives: tuple[Collective, ...],
    chip: Chip,
    chips: int,
) -> Seconds:
    """Seconds on one chip at the published peaks.

    A ring over n chips moves 2 (n - 1) / n of an all-reduced array through each chip, and half as
    much of the whole array of any other collective.
    """
    share = (chips - 1) / chips
    moved = sum(
        one.bytes * share * {"all-reduce": 2, "reduce-scatter": chips}.get(one.kind, 1)
        for one in collectives
    )
    return Seconds(flops / chip.flops, traffic / chip.bandwidth, moved / chip.links)


def knob(shape: tuple[int, ...], where: str, program: Program, vocabulary: int) -> str:
    """The option that makes a tensor smaller, by its shape and its origin."""
    if program.name != "train":
        return "a smaller batch_size"
    if vocabulary in shape and len(shape) > 2:
        return "a smaller compute.vocabulary_chunk (logits of fewer tokens at a time)"
    if where.startswith(("state", "frozen")):
        return "compute.fsdp (parameters and moments sharded over more chips)"
    if "jvp" in where and len(shape) > 3:
        return "compute.remat = true (student layers computed again in the backward pass)"
    return "compute.accumulation, twice as much (half the clips at a time)"


def largest_fitting(
    fits: Callable[[int], float | int], first: int, refused: int | None = None, exact: bool = True
) -> int | None:
    """The largest number that fits, to an eighth; None where not even 1 does.

    fits: asks the compiler, which takes minutes to say yes and seconds to say no: 0 where the
    number does not fit, else how many would by what these take. refused: a number that is known
    not to fit. exact: else any half, quarter, … of `first`.
    """
    low, high, ask = 0, refused, first
    while ask:
        expected = fits(ask)
        if expected:
            low = ask
        else:
            high = ask
        eighth = max(low // 8, 1)
        if high is None:
            ask = max(int(expected), low + eighth)
        elif not low:
            ask = high // 2
        elif exact and high - low > eighth:
            ask = (low + high) // 2
        else:
            break
    return low or None
