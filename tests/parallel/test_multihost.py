"""Two real processes on loopback: they find each other, wait, and end together."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from flax_distil.errors import InputError
from flax_distil.parallel import multihost
from flax_distil.parallel.multihost import VARIABLES, find_place, host_slice

WORKER = Path(__file__).with_name("multihost_worker.py")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def run_hosts(scenario: str, *arguments: Path, **variables: str) -> list[tuple[int, str]]:
    """Exit status and output of each of two hosts of a scenario."""
    hosts = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for host in range(hosts):
        place = dict(zip(VARIABLES, (address, str(hosts), str(host)), strict=True))
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(WORKER.parents[2])}
        processes.append(
            subprocess.Popen(
                [sys.executable, WORKER, scenario, *arguments],
                env=os.environ | own | place | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        return [(process.wait(60), process.stdout.read()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[str]:
    """The output of two hosts that add, encode and stop."""
    endings = run_hosts("together", tmp_path_factory.mktemp("hosts"))
    assert [status for status, _ in endings] == [0, 0], endings
    return [output for _, output in endings]


def test_two_hosts_add_up(together):
    assert "sum 15.0 mine [0.0, 1.0, 2.0] main True" in together[0]
    assert "sum 15.0 mine [3.0, 4.0, 5.0] main False" in together[1]
    assert "host 0 of 2" in together[0]


def test_each_host_encodes_a_part_of_the_clips_and_reads_all(together):
    every = "read [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]"
    assert f"encoded [0, 4] {every}" in together[0]
    assert f"encoded [2, 6] {every}" in together[1]
    assert "own lacks 3 of 7 clips that another host encoded: name a folder on" in together[0]
    assert "own lacks 4 of 7 clips" in together[1]


def test_a_notice_to_one_host_stops_both_before_the_same_step(together):
    before = [output.split("stopped before step ")[1].split()[0] for output in together]
    assert before[0] == before[1]
    assert 6 <= int(before[0]) < 200


def test_barrier_names_the_absent_host():
    (status_0, output_0), (status_1, output_1) = run_hosts("wait_for_absent_host")
    assert (status_0, status_1) == (0, 0), output_0 + output_1
    assert f"'save-7': host 1 ({socket.gethostname()}) did not come within 2 s; 1 of 2" in output_0
    assert "this host came after the others" in output_1


def test_killed_host_ends_the_others():
    begin = time.monotonic()
    (status_0, output_0), (status_1, _) = run_hosts("lose_a_host", HEARTBEAT="5")
    assert status_1 == -15  # SIGTERM ends what does not ask for notices
    assert status_0 not in (0, None)
    assert "unhealthy (stopped sending heartbeats):\n1" in output_0
    assert time.monotonic() - begin < 40


def test_one_host_needs_nothing():
    multihost.start()
    assert not jax.distributed.is_initialized()
    assert multihost.is_main_host()
    multihost.barrier("alone", timeout=0)
    assert host_slice(5) == slice(0, 5)


def test_a_tpu_whose_hosts_nobody_names_is_one_host(monkeypatch):
    def nobody(*_, **__):  # JAX's words
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(multihost, "_on_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    multihost.start()
    assert multihost.is_main_host()


@pytest.mark.parametrize(("count", "hosts"), [(8, 2), (7, 4), (3, 4), (0, 2)])
def test_slices_cover_everything_once(count, hosts):
    parts = [list(range(count))[host_slice(count, host, hosts)] for host in range(hosts)]
    assert [thing for part in parts for thing in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_place_from_the_environment(monkeypatch):
    assert find_place() is None
    for name, value in zip(VARIABLES, ("b:2", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert find_place() == ("b:2", 4, 3)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (("a:1", "", ""), "JAX_NUM_PROCESSES=, JAX_PROCESS_ID=: set all three or none"),
        (("a", "2", "0"), "JAX_COORDINATOR_ADDRESS=a, .* address with a port"),
        (("a:1", "2", "2"), "JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2: .* from 0"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES=two"),
    ],
)
def test_contradictions_are_explained(values, complaint, monkeypatch):
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=complaint):
        find_place()
