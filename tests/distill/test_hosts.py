"""Two real processes of four devices each take a run over, save and die; it goes on in one."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import distill_worker
import numpy as np

from flax_distil.distill.checkpoints import LATEST, steps

WORKER = Path(__file__).with_name("distill_worker.py")


def run_hosts(*arguments: object) -> list[tuple[int, str]]:
    """Exit status and output of each of two hosts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = []
    for host in range(2):
        own = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(host),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": f"{WORKER.parent}{os.pathsep}{WORKER.parents[2]}",
        }
        hosts.append(
            subprocess.Popen(
                [sys.executable, WORKER, *map(str, arguments)],
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [(host.wait(240), host.stdout.read()) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.stdout.close()


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {(one := json.loads(line))["step"]: one["loss"] for line in lines if '"loss"' in line}


def stop_at(position: int) -> Callable[[int], None]:
    """SIGTERM while the batch of this position is read."""
    return lambda read: signal.raise_signal(signal.SIGTERM) if read == position else None


def test_two_hosts_go_on_die_and_one_ends_it(tmp_path):
    """One process of eight devices begins, two of four go on and one of them is killed, one process
    goes on. Losses are those of one that never stopped: sums in another order, 1e-5."""
    folder = tmp_path / "run"
    begun = distill_worker.run(folder, stop_at(3)).steps
    assert 2 <= begun <= 3

    survivor, killed = run_hosts(folder, 4)
    assert killed[0] == -9, killed
    assert survivor[0] != 0
    saved = steps(folder / LATEST)[-1]
    assert saved > begun
    progress = json.loads((folder / LATEST / str(saved) / "progress" / "metadata").read_text())
    lanes = progress["loader"]["streams"]  # of both hosts
    assert lanes == {"0/0": [0, 0, 0, saved], "0/1": [0, 0, 0, saved]}

    for name in ("run", "alone"):
        assert distill_worker.run(tmp_path / name, stop_at(saved + 3)).steps > saved
    found, expected = losses(folder), losses(tmp_path / "alone")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
