"""What a run logs: a line a step, metrics.jsonl, TensorBoard, and W&B if asked for."""

import json
import logging
import math
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_distil.config import DistillConfig
from flax_distil.data.batches import Batch
from flax_distil.data.utterances import Utterance
from flax_distil.distill.validation import Validation
from flax_distil.errors import InputError, writing
from flax_distil.files import write_changed, write_whole
from flax_distil.parallel.multihost import is_main_host

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Tracker:
    """Writes scalars by step wherever the configuration asks, on host 0; a context manager.

    A resumed run first drops the lines after its `start`, which it is about to write again.
    """

    def __init__(self, config: DistillConfig, start: int = 0):
        folder, run = config.output_dir, config.run
        self.wandb = self.tensorboard = self.file = None
        if not is_main_host():
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.wandb = wandb_run(config, run.wandb) if run.wandb else None
        if run.tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        kept = [one for one in read_metrics(folder / METRICS) if one["step"] <= start]
        with writing(folder):
            write_changed(folder / METRICS, "".join(json.dumps(one) + "\n" for one in kept))
            self.file = (folder / METRICS).open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step; names may have a group, as in `validation/wer`."""
        if self.file is None:
            return
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with writing(Path(self.file.name)):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")  # JSON knows no NaN
            self.file.flush()
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            with suppress(OSError):  # of a line that the disk had no room for
                self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, but for lines that a kill cut off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict) and "step" in one]


def wandb_run(config: DistillConfig, project: str) -> Any:
    """A Weights & Biases run, which a resumed one continues."""
    import wandb  # pyright: ignore[reportMissingImports]

    known = config.output_dir / "wandb-id"
    if not known.exists():
        write_whole(known, secrets.token_hex(4).encode())
    return wandb.init(
        project=project,
        name="/".join(config.output_dir.parts[-2:]),
        id=known.read_text(encoding="utf-8"),
        resume="allow",
        dir=config.output_dir,
        config=json.loads(json.dumps(asdict(config), default=str)),
    )


class Watch:
    """Reads the metrics of each step one step late, so that the devices never wait for the host.

    Raises InputError after `config.max_skipped` updates in a row that were not finite or had
    nothing to learn, and where more than `config.max_skipped_share` of the clips could not be used.
    """

    def __init__(
        self, config: DistillConfig, tracker: Tracker, speed: "Speed", clips: Sequence[Utterance]
    ):
        self.config, self.tracker, self.speed, self.names = config, tracker, speed, clips
        self.waiting: tuple[int, Mapping[str, Any], Batch, float] | None = None
        self.loss: float | None = None
        self.batches = self.empty_in_row = self.clips = self.unused = 0
        self.first_unused: list[int] = []

    def dispatched(self, step: int, metrics: Mapping[str, Any], batch: Batch, flops: float) -> None:
        """A step was sent, whose metrics may not be computed yet; the one before it is read."""
        self._read()
        self.waiting = step, metrics, batch, flops

    def pause(self) -> None:
        """Read what is left; what follows is not training and its time does not count."""
        self._read()
        self.speed.pause()

    def validated(self, step: int, found: Validation) -> None:
        """Record error rates, and losses by set and part, such as `clean/kl`."""
        average, values = found.macro_average, found.wer | found.losses
        scalars = {f"validation/{name}": value for name, value in values.items()}
        self.tracker.scalars(step, scalars | {"validation/wer": average})
        if found.losses:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.losses.items())
            log.info("losses at step %d: %s", step, shown)
        units = {name: found.rates.get(name, "WER") for name in found.wer}
        sets = ", ".join(
            f"{name} {value:.2f}" + ("" if units[name] == "WER" else f" {units[name]}")
            for name, value in found.wer.items()
        )
        unit = "/".join(sorted({*units.values()}, reverse=True))
        log.info("validation at step %d: %s %.2f %% (%s)", step, unit, average, sets)

    def ended(self, step: int) -> None:
        """Read what is left. Raises InputError if a run had too little to learn from."""
        self.pause()
        self._check_share(step, self.batches)

    def _read(self) -> None:
        if self.waiting is None:
            return
        (step, metrics, batch, flops), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        hosts = jax.process_count()
        self.loss = values["loss"]
        self.speed.finished(hosts * len(batch.rows), hosts * float(batch.seconds.sum()), flops)
        self._check_clips(step, values, batch)
        if step % self.config.run.log_every == 0:
            values |= self.speed.rates()
            self.tracker.scalars(step, values)
            log.info("%s", line(step, self.config.optimizer.steps, values))

    def _check_clips(self, step: int, values: Mapping[str, float], batch: Batch) -> None:
        most, rows = self.config.max_skipped, np.asarray(batch.rows)
        unused = rows[~np.asarray(batch.weights).any(axis=1)]
        self.batches, self.clips = self.batches + 1, self.clips + len(rows)
        self.unused += len(unused)
        self.first_unused = [*self.first_unused, *unused.tolist()][:3]
        self.empty_in_row = 0 if values["tokens"] else self.empty_in_row + 1
        if self.empty_in_row >= most:
            raise InputError(
                f"the last {self.empty_in_row} batches, to step {step}, had no clip to learn from "
                f"({self._ids(self.first_unused)}, …): the warnings above say why. Is the audio "
                "where the labels name it?"
            )
        self._check_share(step, most)
        in_row = int(values["skipped_in_row"])
        if in_row:
            ids = self._ids(rows.tolist())
            log.warning("step %d was not finite and is skipped; its clips: %s", step, ids)
        if in_row >= most:
            raise InputError(
                f"{in_row} updates in a row were not finite, the last at step {step}: lower the "
                "learning rate, use float32, or look at the clips that were named"
            )

    def _check_share(self, step: int, after: int) -> None:
        """Raises InputError if too few clips could be used in `after` batches or more."""
        most = self.config.max_skipped_share
        if self.batches >= after and self.unused > most * self.clips:
            raise InputError(
                f"{self.unused} of {self.clips} clips could not be used to step {step} "
                f"({self._ids(self.first_unused)}, …), more than max_skipped_share {most:g}: the "
                "warnings above say why"
            )

    def _ids(self, rows: Sequence[int]) -> str:
        return ", ".join("streamed" if row < 0 else self.names[row].id for row in rows)


def environment() -> dict[str, Any]:
    """What else decides a run: versions, devices, and the commit of this code if known."""
    packages = ("flax-distil", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        **source_of(Path(__file__)),
    }


def source_of(file: Path) -> dict[str, Any]:
    """The commit that a file of this package is of, and whether the package differs from it.

    Nothing where git does not track the file: a repository around an installed package is another
    project's.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(file.parents[1]), *words]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(file))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


class Speed:
    """Rates and remaining time from the moments at which steps were seen to be finished.

    peak: FLOP/s of all devices together. The first step holds the compilation and is left out.
    """

    def __init__(self, peak: float, steps_left: int):
        self.peak, self.steps_left = peak, steps_left
        self.pace: float | None = None  # seconds a step, averaged, for the time that remains
        self.pause()

    def pause(self) -> None:
        """What follows is not training (validation): do not count its time."""
        self.begin: float | None = None
        self.sums = np.zeros(4)  # steps, samples, seconds of audio, FLOPs since `begin`

    def finished(self, samples: int, audio_seconds: float, flops: float) -> None:
        """One more step is done."""
        self.steps_left -= 1
        if self.begin is None:
            self.begin = time.perf_counter()
        else:
            self.sums += (1, samples, audio_seconds, flops)

    def rates(self) -> dict[str, float]:
        """Since the last call: samples/s, hours of audio an hour, MFU; and seconds that remain."""
        if self.begin is None or not self.sums[0]:
            return {}
        now = time.perf_counter()
        spent = max(now - self.begin, 1e-9)
        steps, samples, seconds, flops = (self.sums / spent).tolist()
        pace = 0.9 * self.pace + 0.1 / steps if self.pace else 1 / steps
        self.pace, self.begin, self.sums = pace, now, np.zeros(4)
        return {
            "samples_per_second": samples,
            "audio_hours_per_hour": seconds,
            "mfu": flops / self.peak,
            "eta_seconds": pace * self.steps_left,
        }


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """The console's line of one step."""
    parts = ", ".join(f"{name} {values[name]:.3f}" for name in ("kl", "ce", "mse") if values[name])
    text = (
        f"step {step:>{len(str(steps))}}/{steps}  loss {values['loss']:.4f} ({parts})  "
        f"|g| {values['gradient_norm']:.3g}  lr {values['learning_rate']:.2e}"
    )
    if "mfu" not in values:
        return text
    return text + (
        f"  {values['samples_per_second']:.2f} samples/s"
        f"  {values['audio_hours_per_hour']:.1f} h/h  MFU {100 * values['mfu']:.1f} %"
        f"  ETA {timedelta(seconds=round(values['eta_seconds']))}"
    )
