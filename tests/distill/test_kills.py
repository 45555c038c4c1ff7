"""`kill -9` at random instants, also while a checkpoint is written: no step is lost twice, and the
run ends where one ends that was never stopped, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_distil.distill.checkpoints import read_params

KILLS = int(os.environ.get("FLAX_DISTIL_KILLS", "2"))  # twenty by hand: docs/LOG.md
STEPS = 8 * KILLS


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Exit status and checkpoints of each child, of a run left alone and one that was killed."""
    folder = tmp_path_factory.mktemp("kills")
    program = str(Path(__file__).with_name("killed_run.py"))
    own = {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device, quick to compile
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[2]}",
    }

    def ran(name: str, kills: int) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, program, str(folder / name), str(kills), str(STEPS)],
            env=os.environ | own,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]

    return folder, {"whole": ran("whole", -1), "killed": ran("killed", KILLS)}


def test_children_were_killed_at_work(endings):
    _, found = endings
    statuses = [status for status, *_ in found["killed"]]
    assert statuses == [-9] * KILLS + [0, 0]  # SIGTERM is no failure
    reached = [max(saved, default=0) for _, *saved in found["killed"]]
    assert reached == sorted(reached)
    assert reached[-1] == STEPS
    assert reached[-3] < STEPS  # the last one killed had work left


def test_parameters_and_losses_are_those_of_a_run_left_alone(endings, student):
    folder, _ = endings
    like = {"decoder": student.params["decoder"]}
    (_, whole), (_, killed) = (read_params(folder / name, like) for name in ("whole", "killed"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, killed)))
    of_runs = [
        {(one := json.loads(line))["step"]: one["loss"] for line in path.read_text().splitlines()}
        for path in (folder / name / "metrics.jsonl" for name in ("whole", "killed"))
    ]
    assert list(of_runs[0]) == list(of_runs[1]) == list(range(1, STEPS + 1))
    assert of_runs[0] == of_runs[1]
