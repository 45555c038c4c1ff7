"""Checkpoints of a run: the latest few to resume from, and the best to export.

    <run>/checkpoints/<step>/   params, rest (all else of the state), progress (JSON)
    <run>/best/<step>/          params, progress

Orbax writes them beside the run, asynchronously, and renames a complete one into place: a kill or a
full disk leaves the one before as it was. Orbax does not verify what a disk
gives back: `progress` holds a sum of the bits of every array, taken on the devices.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_distil.data.loader import LoaderState, gather_state
from flax_distil.distill.replicas import bit_sums
from flax_distil.distill.state import TrainState
from flax_distil.errors import InputError, writing

LATEST, BEST = "checkpoints", "best"


@dataclass(frozen=True)
class RunProgress:
    """The state of a run beside its arrays."""

    loader: LoaderState
    """Continues after the last batch that was trained on."""
    best_wer: float | None = None
    """Lowest macro-average so far, in percent."""
    best_step: int | None = None
    since_best: int = 0
    """Validations since then, for early stopping."""


class Checkpoints:
    """The checkpoints of one run's folder; opening it removes what a kill left half-written."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.failed = folder.absolute(), False
        quieten()
        with writing(self.folder):
            self.latest = manager(self.folder / LATEST, keep)
            self.best = manager(self.folder / BEST, 1)

    def save(self, state: TrainState, progress: RunProgress) -> None:
        """Start to save everything that continuing needs; returns once the arrays are copied."""
        step = int(state.step)
        if step not in self.latest.all_steps():
            rest = state._replace(params=None)
            self._save(self.latest, step, progress, params=state.params, rest=rest)

    def save_best(self, state: TrainState, progress: RunProgress) -> None:
        """Start to save the parameters as the best so far."""
        step = int(state.step)
        if step not in self.best.all_steps():
            self._save(self.best, step, progress, params=state.params)

    def forget_best_after(self, step: int) -> None:
        """Delete a best that a killed run chose after `step`: it will be chosen again."""
        for later in self.best.all_steps():
            if later > step:
                self.best.delete(later)

    def restore(self, like: TrainState) -> tuple[TrainState, RunProgress]:
        """The latest state, placed as the arrays or shapes of `like` say.

        Raises:
            InputError: it does not exist, is damaged, or of another model or optimizer.
        """
        step = self.latest.latest_step()
        if step is None:
            raise InputError(
                f"{self.folder} has no checkpoint to resume from: is it the right run?"
            )
        arguments = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            rest=ocp.args.StandardRestore(like._replace(params=None)),
            progress=ocp.args.JsonRestore(),
        )
        folder = self.folder / LATEST / str(step)
        with readable(folder):
            found = self.latest.restore(step, args=arguments)
            saved = dict(found["progress"])
            sums, loader = saved.pop("sums"), LoaderState(**saved.pop("loader"))
            progress = RunProgress(loader, **saved)
        arrays = {"params": found["params"], "rest": found["rest"]}
        check_sums(bit_sums(arrays) | json_sum(progress), sums, folder)
        return found["rest"]._replace(params=found["params"]), progress

    def wait(self) -> None:
        """Until everything is on disk. Raises InputError when it could not be written."""
        try:
            self.latest.wait_until_finished()
            self.best.wait_until_finished()
        except (OSError, ValueError) as error:  # TensorStore tells a full disk by a ValueError
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Wait, unless something could not be written before, and give threads and locks back."""
        try:
            if not self.failed:
                self.wait()
        finally:
            for one in (self.latest, self.best):
                with suppress(*((OSError, ValueError) if self.failed else ())):  # raised before
                    one.close()

    def _save(self, one: ocp.CheckpointManager, step: int, progress: RunProgress, **trees: Any):
        self.wait()  # for the one before, whose failure would otherwise be reported as this one's
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        progress = replace(progress, loader=gather_state(progress.loader))
        sums = bit_sums(trees) | json_sum(progress)
        items["progress"] = ocp.args.JsonSave(asdict(progress) | {"sums": sums})
        try:
            one.save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError) as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> InputError:
        self.failed, whole = True, steps(self.folder / LATEST)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error).strip().splitlines()[0][-160:]
        intact = f"that of step {whole[-1]} is intact" if whole else "there is none before it"
        return InputError(
            f"a checkpoint could not be written to {self.folder} ({reason}); {intact}: make room "
            "and continue with --run.resume auto"
        )


@cache
def quieten() -> None:
    """Let nothing print the tracebacks of Orbax's threads, for the rest of the process: `wait`
    raises the first of their errors, and the others follow from it.

    Orbax logs them through absl, asyncio those that a thread left behind, and TensorStore tells the
    unraisable hook that nobody waits for its writes any more.
    """

    def of_others(record: logging.LogRecord) -> bool:
        caught = record.exc_info[1] if record.exc_info else None
        text = "".join(traceback.format_exception(caught)) if caught else ""
        return record.levelno < logging.ERROR or "orbax" not in record.pathname + text

    def hook(unraisable: Any, before: Any = sys.unraisablehook) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(of_others)
    sys.unraisablehook = hook


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """Orbax over one folder of steps."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(folder, options=options)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run's folder has a checkpoint to resume from."""
    return bool(steps(folder / LATEST))


def steps(folder: Path) -> list[int]:
    """The complete checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def read_params(
    run: Path, like: Any, which: Literal["best", "latest"] | int = "best"
) -> tuple[int, Any]:
    """The step and the trained parameters of a run, as numpy, in the form of `like`'s shapes.

    "best" is the latest if no validation chose one.

    Raises:
        InputError: the run has no such checkpoint, it is damaged, or its parameters are others
            than `like`.
    """
    found = {name: steps(run / name) for name in (LATEST, BEST)}
    name, step = pick_checkpoint(run, found, which)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    folder = (run / name / str(step)).absolute()
    with readable(folder), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", like)
        sums = json.loads((folder / "progress" / "metadata").read_text())["sums"]
    check_sums(bit_sums({"params": params}), sums, folder)
    return step, jax.tree.map(np.asarray, params)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raises a one-sentence InputError if the checkpoint of a step cannot be read."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        differing = re.findall(r"^([\w.]+):$", str(error), re.MULTILINE)
        if differing == ["rng"]:
            raise InputError(
                f"{folder} was written by an older version of flax-distil, whose states hold rng: "
                "finish the run with that version, or begin a new one"
            ) from error
        if differing:
            raise InputError(
                f"{folder} is of another model than this run trains, or of other settings of "
                "train_encoder or compute.scan_layers: they do not both have "
                f"{', '.join(differing[:3])}"
            ) from error
        raise InputError(f"{folder} is damaged or of another model: {error}") from error


def json_sum(progress: RunProgress) -> dict[str, int]:
    """As `bit_sums`, of what is written as JSON."""
    return {"progress": crc32(json.dumps(asdict(progress), sort_keys=True).encode())}


def check_sums(found: Mapping[str, int], saved: Mapping[str, int], folder: Path) -> None:
    """Raises InputError if something that was read is not what was saved."""
    damaged = [name for name, value in found.items() if value != saved.get(name)]
    if damaged:
        raise InputError(
            f"{folder} is damaged: {', '.join(damaged[:3])} cannot be what was saved. Delete this "
            "folder to go on from the checkpoint before it"
        )


def pick_checkpoint(
    run: Path, found: dict[str, list[int]], which: Literal["best", "latest"] | int
) -> tuple[str, int]:
    """Folder and step of the requested checkpoint."""
    if which == "best" and found[BEST]:
        return BEST, found[BEST][-1]
    if which in ("best", "latest") and found[LATEST]:
        return LATEST, found[LATEST][-1]
    for name in (LATEST, BEST):
        if which in found[name]:
            return name, int(which)
    present = ", ".join(str(step) for step in sorted({*found[LATEST], *found[BEST]})) or "none"
    raise InputError(f"{run} has no checkpoint {which}; it has {present}")
