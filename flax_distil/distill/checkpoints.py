"""Checkpoints of a run: the latest few to resume from, and the best to export.

    <run>/checkpoints/<step>/   params, rest (all else of the state), progress (JSON)
    <run>/best/<step>/          params, progress

Orbax writes them beside the run, asynchronously, and renames a complete one into place: a kill or a
full disk leaves the one before as it was.

`progress` holds sums of the bits of all that is saved. Data parallelism keeps a copy of every
parameter on each device of the data axis and gives all of them the same updates. A fault of
hardware, or a program that is not deterministic, can make them differ unnoticed: the loss is an
average over all, and a checkpoint holds the first copy alone. So before each checkpoint every
device sums the bits of its parts, in one pass over the state. Orbax does not verify what it reads;
the sums do.
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
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from flax_distil.data.loader import LoaderState, gather_state
from flax_distil.distill.step import TrainState
from flax_distil.errors import InputError, writing
from flax_distil.parallel.mesh import make_mesh

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
        options = partial(ocp.CheckpointManagerOptions, cleanup_tmp_directories=True)
        quieten()
        with writing(self.folder):
            self.latest = ocp.CheckpointManager(
                self.folder / LATEST, options=options(max_to_keep=keep)
            )
            self.best = ocp.CheckpointManager(self.folder / BEST, options=options(max_to_keep=1))

    def save(self, state: TrainState, progress: RunProgress, best: bool = False) -> None:
        """Start to save everything that continuing needs; returns once the arrays are copied.

        best: save the parameters alone, as the best so far.

        Raises:
            InputError: the disk is full, or copies of an array on different devices differ.
        """
        manager, step = self.best if best else self.latest, int(state.step)
        if step in manager.all_steps():
            return
        self.wait()  # for the one before, whose failure would otherwise be reported as this one's
        trees: dict[str, Any] = {"params": state.params}
        if not best:
            trees["rest"] = state._replace(params=None)
        values = asdict(replace(progress, loader=gather_state(progress.loader)))
        sums = check_replicas(trees, step) | {"progress": json_sum(values)}
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["progress"] = ocp.args.JsonSave(values | {"sums": sums})
        with self._writing():
            manager.save(step, args=ocp.args.Composite(**items), force=True)

    def forget_best_after(self, step: int) -> None:
        """Delete a best that a killed run chose after `step`: it will be chosen again."""
        for later in self.best.all_steps():
            if later > step:
                self.best.delete(later)

    def restore(self, like: TrainState) -> tuple[TrainState, RunProgress]:
        """The latest state, placed as the arrays or shapes of `like` say.

        Raises:
            InputError: it is damaged, or of another model or optimizer.
        """
        step = self.latest.latest_step()
        arguments = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            rest=ocp.args.StandardRestore(like._replace(params=None)),
            progress=ocp.args.JsonRestore(),
        )
        folder = self.folder / LATEST / str(step)
        with readable(folder):
            found = self.latest.restore(step, args=arguments)
            values = dict(found["progress"])
            sums = values.pop("sums", None)
            fields: dict[str, Any] = values | {"loader": LoaderState(**values["loader"])}
            progress = RunProgress(**fields)
        arrays = {name: found[name] for name in ("params", "rest")}
        check_sums(arrays, values, sums, folder)
        return found["rest"]._replace(params=found["params"]), progress

    def wait(self) -> None:
        """Until everything is on disk. Raises InputError when it could not be written."""
        with self._writing():
            self.latest.wait_until_finished()
            self.best.wait_until_finished()

    def close(self) -> None:
        """Wait, unless something could not be written before, and give threads and locks back."""
        try:
            if not self.failed:
                self.wait()
        finally:
            for manager in (self.latest, self.best):
                with suppress(*((OSError, ValueError) if self.failed else ())):  # raised before
                    manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore tells a full disk by a ValueError
            self.failed, whole = True, steps(self.folder / LATEST)
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None)
            reason = os.strerror(number) if number else str(error).strip().splitlines()[0][-160:]
            intact = f"that of step {whole[-1]} is intact" if whole else "there is none before it"
            raise InputError(
                f"a checkpoint could not be written to {self.folder} ({reason}); {intact}: make "
                "room and continue with --run.resume auto"
            ) from error


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
    folder = pick_checkpoint(run, which).absolute()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with readable(folder), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", like)
        sums = json.loads((folder / "progress" / "metadata").read_text()).get("sums")
    check_sums({"params": params}, None, sums, folder)
    return int(folder.name), jax.tree.map(np.asarray, params)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raises a one-sentence InputError if the checkpoint of a step cannot be read."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        differing = re.findall(r"^([\w.]+):$", str(error), re.MULTILINE)
        if differing:
            raise InputError(
                f"{folder} is of another model than this run trains, or of other settings of "
                "train_encoder or compute.scan_layers: they do not both have "
                f"{', '.join(differing[:3])}"
            ) from error
        raise InputError(f"{folder} is damaged or of another model: {error}") from error


def pick_checkpoint(run: Path, which: Literal["best", "latest"] | int) -> Path:
    """The folder of the requested checkpoint. Raises InputError where there is none."""
    latest, best = (
        {step: run / kind / str(step) for step in steps(run / kind)} for kind in (LATEST, BEST)
    )
    found: dict[str | int, Path] = {**best, **latest}
    if latest:
        found["latest"] = found["best"] = latest[max(latest)]
    if best:
        found["best"] = best[max(best)]
    if which not in found:
        present = ", ".join(map(str, sorted({*best, *latest}))) or "none"
        raise InputError(f"{run} has no checkpoint {which}; it has {present}")
    return found[which]


# --- sums of bits -------------------------------------------------------------------------------


def check_replicas(tree: Any, step: int) -> dict[str, int]:
    """The sums of the arrays' bits, by name. All hosts call it at once.

    Raises:
        InputError: copies on different devices differ.
    """
    sums, differing = bit_sums(tree)
    if differing:
        raise InputError(
            f"at step {step} the copies of {', '.join(differing[:3])} on different devices are not "
            "the same: a device is faulty. Continue from the last checkpoint (--run.resume must), "
            "on other devices if it happens again"
        )
    return sums


def check_sums(arrays: Any, progress: Any, saved: Mapping[str, int] | None, folder: Path) -> None:
    """Raises InputError if arrays or JSON were read from `folder` that are not what was saved.

    saved: their sums; None in checkpoints of versions that wrote none, which are not compared.
    """
    if saved is None:
        return
    sums, _ = bit_sums(arrays)
    if progress is not None:
        sums["progress"] = json_sum(progress)
    if damaged := [name for name, value in sums.items() if value != saved.get(name)]:
        raise InputError(
            f"{folder} is damaged: {', '.join(damaged[:3])} cannot be what was saved. Delete this "
            "folder to go on from the checkpoint before it"
        )


def first_three(names: list[str]) -> str:
    """Three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def json_sum(values: Any) -> int:
    """A sum of what is written as JSON."""
    return crc32(json.dumps(values, sort_keys=True).encode())


def bit_sums(tree: Any) -> tuple[dict[str, int], list[str]]:
    """The sum of each array's numbers read as unsigned integers, modulo 2^32, by its name: the same
    on any mesh. And the names of arrays whose copies on different devices differ."""
    named, _ = jax.tree_util.tree_flatten_with_path(tree)
    placed = [getattr(leaf, "sharding", None) for _, leaf in named]
    meshes = (one.mesh for one in placed if isinstance(one, NamedSharding))
    mesh = next(meshes, None) or make_mesh(devices=jax.local_devices()[:1])
    specs = tuple(getattr(one, "spec", PartitionSpec()) for one in placed)
    by_device = jax.device_get(device_sums([leaf for _, leaf in named], mesh, specs))
    sums, differing = {}, []
    for (path, _), spec, column in zip(named, specs, by_device.T, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        cut = jax.tree.leaves(tuple(spec))  # an array has copies along all other axes of the mesh
        copied = tuple(n for n, axis in enumerate(mesh.axis_names) if axis not in cut)
        of_devices = column.reshape(mesh.axis_sizes)
        parts = of_devices.min(axis=copied)
        if (parts != of_devices.max(axis=copied)).any():
            differing.append(name)
        sums[name] = int(parts.sum(dtype=np.uint32))
    return sums, differing


@partial(jax.jit, static_argnames=("mesh", "specs"))
def device_sums(
    leaves: list[Array], mesh: Mesh, specs: tuple[PartitionSpec, ...]
) -> UInt32[Array, "devices n"]:
    """What each device holds of each array, its bits summed; every host gets all sums."""

    def bits(part: Array) -> UInt32[Array, ""]:
        unsigned = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
        return jnp.sum(jax.lax.bitcast_convert_type(part, unsigned), dtype=jnp.uint32)

    def of_device(parts: list[Array]) -> UInt32[Array, "devices n"]:
        return jax.lax.all_gather(jnp.stack([bits(part) for part in parts]), mesh.axis_names)

    everywhere = PartitionSpec()
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(list(specs),), out_specs=everywhere, check_vma=False
    )(leaves)
