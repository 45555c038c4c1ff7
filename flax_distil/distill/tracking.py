"""What a run logs: a line a step, metrics.jsonl, TensorBoard, and W&B if asked for."""

import json
import logging
import math
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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
        self.tensorboard = tensorboard_writer(folder) if run.tensorboard else None
        with writing(folder):
            keep_until(folder / METRICS, start)
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


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            log.warning("%s: dropped a line that was cut off", path)
    write_changed(path, "".join(kept))


def tensorboard_writer(folder: Path) -> Any:
    """TensorBoard's own writer, which needs neither TensorFlow nor PyTorch."""
    from tensorboard.summary import Writer

    return Writer(str(folder / "tensorboard"))


def wandb_run(config: DistillConfig, project: str) -> Any:
    """A Weights & Biases run, which a resumed one continues."""
    import wandb  # pyright: ignore[reportMissingImports]

    known = config.output_dir / "wandb-id"
    if not known.exists() or not known.read_text(encoding="utf-8"):
        write_whole(known, secrets.token_hex(4).encode())
    return wandb.init(
        project=project,
        name="/".join(config.output_dir.parts[-2:]),
        id=known.read_text(encoding="utf-8"),
        resume="allow",
        dir=config.output_dir,
        config=json.loads(json.dumps(asdict(config), default=str)),
    )


class Done(NamedTuple):
    """A step that was sent to the devices; its metrics may not be computed yet."""

    step: int
    metrics: Mapping[str, Any]
    batch: Batch
    flops: float


class Watch:
    """Reads the metrics of each step one step late, so that the devices never wait for the host.

    Raises InputError after `config.max_skipped` updates in a row that were not finite or had
    nothing to learn, and where more than `config.max_skipped_share` of the clips could not be used.
    """

    def __init__(
        self, config: DistillConfig, tracker: Tracker, speed: "Speed", names: Sequence[Utterance]
    ):
        self.config, self.tracker, self.speed, self.names = config, tracker, speed, names
        self.waiting: Done | None = None
        self.loss: float | None = None
        self.batches = self.empty_in_row = self.clips = self.unused = 0
        self.first_unused: list[int] = []

    def dispatched(self, done: Done) -> None:
        """A step was sent; the one before it is read."""
        self._read()
        self.waiting = done

    def pause(self) -> None:
        """Read what is left; what follows is not training and its time does not count."""
        self._read()
        self.speed.pause()

    def validated(
        self, step: int, validation: Validation, losses: Mapping[str, float] | None = None
    ) -> None:
        """Record error rates, and losses by set and part, such as `clean/kl`."""
        wer = {f"validation/{name}": value for name, value in validation.wer.items()}
        average = validation.macro_average
        parts = {f"validation/{name}": value for name, value in (losses or {}).items()}
        self.tracker.scalars(step, wer | parts | {"validation/wer": average})
        if parts:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in (losses or {}).items())
            log.info("losses at step %d: %s", step, shown)
        rates = validation.rates
        sets = ", ".join(
            f"{name} {value:.2f}" + (f" {rates[name]}" if rates.get(name, "WER") != "WER" else "")
            for name, value in validation.wer.items()
        )
        rate = "/".join(sorted(set(rates.values()), reverse=True)) or "WER"
        log.info("validation at step %d: %s %.2f %% (%s)", step, rate, average, sets)

    def _read(self) -> None:
        if self.waiting is None:
            return
        (step, metrics, batch, flops), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        hosts = jax.process_count()
        self.loss = values["loss"]
        self.speed.finished(hosts * len(batch.rows), hosts * float(batch.seconds.sum()), flops)
        self._check_clips(step, values["tokens"], batch)
        if values["skipped_in_row"]:
            self._skipped(step, int(values["skipped_in_row"]), batch)
        if step % self.config.run.log_every == 0:
            values |= self.speed.rates()
            self.tracker.scalars(step, values)
            log.info("%s", line(step, self.config.optimizer.steps, values))

    def ended(self, step: int) -> None:
        """Raises InputError if a finished run had too little to learn from."""
        self._check_share(step, last=True)

    def _check_clips(self, step: int, tokens: float, batch: Batch) -> None:
        learnt = np.count_nonzero(batch.weights, axis=1) > 0
        self.batches, self.clips = self.batches + 1, self.clips + len(learnt)
        unused = np.asarray(batch.rows)[~learnt].tolist()
        self.unused, self.first_unused = self.unused + len(unused), self.first_unused + unused
        del self.first_unused[3:]
        self.empty_in_row = 0 if tokens else self.empty_in_row + 1
        if self.empty_in_row >= self.config.max_skipped:
            raise InputError(
                f"the last {self.empty_in_row} batches, to step {step}, had no clip to learn from "
                f"({self._ids(self.first_unused)}, …): the warnings above say why. Is the audio "
                "where the labels name it?"
            )
        self._check_share(step)

    def _check_share(self, step: int, last: bool = False) -> None:
        share, most = self.unused / max(self.clips, 1), self.config.max_skipped_share
        if share > most and (last or self.batches >= self.config.max_skipped):
            raise InputError(
                f"{self.unused} of {self.clips} clips could not be used to step {step} "
                f"({self._ids(self.first_unused)}, …), more than max_skipped_share {most:g}: the "
                "warnings above say why"
            )

    def _ids(self, rows: Iterable[int]) -> str:
        return ", ".join("streamed" if row < 0 else self.names[int(row)].id for row in rows)

    def _skipped(self, step: int, in_row: int, batch: Batch) -> None:
        ids = self._ids(batch.rows)
        log.warning("step %d was not finite and is skipped; its clips: %s", step, ids)
        if in_row >= self.config.max_skipped:
            raise InputError(
                f"{in_row} updates in a row were not finite, the last at step {step}: lower the "
                "learning rate, use float32, or look at the clips that were named"
            )


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
    package = file.parents[1]
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, check=True, text=True, env=elsewhere)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(file))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


@dataclass
class Speed:
    """Rates and remaining time from the moments at which steps were seen to be finished.

    peak: FLOP/s of all devices together. The first step holds the compilation and is left out.
    """

    peak: float
    steps_left: int
    begin: float | None = None
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    pace: float | None = None
    """Seconds a step, averaged exponentially, for the time that remains."""

    def finished(self, samples: int, audio_seconds: float, flops: float) -> None:
        """One more step is done."""
        self.steps_left -= 1
        if self.begin is None:
            self.begin = time.perf_counter()
            return
        self.steps += 1
        self.samples += samples
        self.seconds += audio_seconds
        self.flops += flops

    def rates(self) -> dict[str, float]:
        """Since the last call: samples/s, hours of audio an hour, MFU; and seconds that remain."""
        if self.begin is None or not self.steps:
            return {}
        now = time.perf_counter()
        spent = max(now - self.begin, 1e-9)
        step = spent / self.steps
        self.pace = step if self.pace is None else 0.9 * self.pace + 0.1 * step
        rates = {
            "samples_per_second": self.samples / spent,
            "audio_hours_per_hour": self.seconds / spent,
            "mfu": self.flops / spent / self.peak,
            "eta_seconds": self.pace * self.steps_left,
        }
        self.begin, self.steps, self.samples, self.seconds, self.flops = now, 0, 0, 0.0, 0.0
        return rates

    def pause(self) -> None:
        """What follows is not training (validation): do not count its time."""
        self.begin, self.steps, self.samples, self.seconds, self.flops = None, 0, 0, 0.0, 0.0


def line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """The console's line of one step."""
    text = f"step {step:>{len(str(steps))}}/{steps}  loss {values['loss']:.4f} ("
    parts = [f"{part} {values[part]:.3f}" for part in ("kl", "ce", "mse") if values[part]]
    text += ", ".join(parts) + f")  |g| {values['gradient_norm']:.3g}"
    text += f"  lr {values['learning_rate']:.2e}"
    if "mfu" in values:
        text += f"  {values['samples_per_second']:.2f} samples/s"
        text += f"  {values['audio_hours_per_hour']:.1f} h/h  MFU {100 * values['mfu']:.1f} %"
        text += f"  ETA {clock(values['eta_seconds'])}"
    return text


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
