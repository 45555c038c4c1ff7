"""What a compiled program takes: memory, traffic and a lower bound of its time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from flax_distil.plan.compiler import Compiled, Refusal
from flax_distil.plan.hlo import Held
from flax_distil.plan.programs import Program
from flax_distil.plan.topology import Slice


class Seconds(NamedTuple):
    """The roofline: the time of one run if limited by one of the three alone."""

    compute: float
    memory: float | int
    network: float

    @property
    def bound(self) -> float:
        """All three perfectly overlapped."""
        return max(self)

    @property
    def limit(self) -> str:
        """What limits the run."""
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
        """On one chip at the published peaks.

        A ring over n chips moves 2 (n - 1) / n of an all-reduced array through each chip, and half
        as much of the whole array of any other collective.
        """
        chip, answer = self.target.chip, self.answer
        factors = {"all-reduce": 2, "reduce-scatter": self.chips}
        moved = sum(one.bytes * factors.get(one.kind, 1) for one in answer.collectives)
        moved *= (self.chips - 1) / self.chips
        flops = self.program.flops / self.chips
        return Seconds(flops / chip.flops, answer.traffic / chip.bandwidth, moved / chip.links)

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
        """(option that makes it smaller, array) of the largest arrays in HBM."""
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
