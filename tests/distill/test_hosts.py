"""Two real processes of four devices each: they train, save, are stopped and killed, and the run
goes on in one process."""

import json
import os
import signal
import socket
import subprocess
import sys
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


def test_two_hosts_stop_die_and_go_on_as_one(tmp_path):
    """Losses are those of one process: sums in another order, 1e-5."""
    folder = tmp_path / "run"
    endings = run_hosts(folder, 5, -1)
    assert [status for status, _ in endings] == [0, 0], endings
    said = [output.split("ended ")[1].split() for _, output in endings]
    stopped = int(said[0][0])
    assert said[0] == said[1]  # step and validation
    assert 4 <= stopped < 60
    assert said[0][1] == "False"
    assert steps(folder / LATEST)[-1] == stopped

    survivor, killed = run_hosts(folder, -1, stopped + stopped % 2 + 2)
    assert killed[0] == -9
    assert survivor[0] != 0
    saved = steps(folder / LATEST)[-1]
    assert saved > stopped
    progress = json.loads((folder / LATEST / str(saved) / "progress" / "metadata").read_text())
    lanes = progress["loader"]["streams"]  # of both hosts
    assert lanes == {"0/0": [0, 0, 0, saved], "0/1": [0, 0, 0, saved]}

    def stop(position: int) -> None:
        if position == saved + 3:
            signal.raise_signal(signal.SIGTERM)

    for name in ("run", "alone"):
        assert distill_worker.run(tmp_path / name, stop).steps > saved
    found, expected = losses(folder), losses(tmp_path / "alone")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
