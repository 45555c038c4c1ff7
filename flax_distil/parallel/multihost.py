"""Several hosts, one program: start together, wait for each other, end together.

On a TPU pod the hosts find each other. Elsewhere each needs arguments or environment variables:
JAX_COORDINATOR_ADDRESS (host 0, with a port), JAX_NUM_PROCESSES and JAX_PROCESS_ID. One process
without any of them is a run on one host, for which nothing here waits or connects.

A host that dies stops its heartbeats: within `heartbeat` seconds JAX's coordination service ends
every other process with status 134 (SIGABRT) and «The following tasks are unhealthy (stopped
sending heartbeats): 3», also those that hang in a collective. When host 0 dies, which runs the
service, the others report at once that the leader task is gone.
"""

import faulthandler
import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30  # a killed host ends the others within a minute
CONNECT_SECONDS = 300  # hosts of a pod are set up and launched one after the other
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
HOST_NAMES = "flax_distil/host"  # in the coordinator's key-value store

Stop = Callable[[int], bool]
"""Whether to stop before the next step; asked after each step, by every host."""


def start(
    *,
    heartbeat: int = HEARTBEAT_SECONDS,
    connect: int = CONNECT_SECONDS,
    notices: bool = False,
) -> None:
    """Join the other hosts, before anything asks JAX for its devices; a second call does nothing.

    Args:
        heartbeat: seconds of silence after which a host counts as dead and the others end.
        connect: seconds to wait for all hosts to come.
        notices: whether SIGTERM is a notice that several hosts ask JAX for, as training does; else
            it does what it did before, where JAX would let it pass.

    Raises:
        InputError: some of the environment variables are set and others not, or they contradict
            each other.
    """
    if jax.distributed.is_initialized():
        return
    place, name = find_place(), socket.gethostname()
    if place is None and not _on_tpu():
        return
    if place is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        coordinator, hosts, here = place
        who = f"host {here} of {hosts} ({name})"
        logger.info("%s waits up to %d s for all at %s", who, connect, coordinator)
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            *(place or (None, None, None)),  # a TPU pod fills these in by itself
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=connect,
        )
    except ValueError as error:
        if place is not None or "coordinator_address" not in str(error):
            raise
        logger.info("nothing here names this TPU's hosts, as on Colab: it is taken for one host")
        return
    if not (notices and jax.process_count() > 1):
        signal.signal(signal.SIGTERM, before)
    faulthandler.enable()  # where each host was when a dead one ended them all
    here = jax.process_index()
    _client().key_value_set(f"{HOST_NAMES}/{here}", name, True)
    who = f"host {here} of {jax.process_count()}"
    logger.info("%s is %s: %d devices", who, name, jax.local_device_count())
    if not is_main_host():  # host 0 alone logs information
        logging.getLogger("flax_distil").setLevel(logging.WARNING)


def find_place() -> tuple[str, int, int] | None:
    """The coordinator, the number of processes and that of this one, by the environment variables.

    Raises:
        InputError: some of the three are lacking, or they contradict each other.
    """
    address, count, index = values = [os.environ.get(name, "") for name in VARIABLES]
    if not any(values):
        return None
    numbers = (address.rpartition(":")[2], count, index)
    if ":" not in address or not all(map(str.isdigit, numbers)) or int(index) >= int(count):
        found = ", ".join(f"{name}={value}" for name, value in zip(VARIABLES, values, strict=True))
        raise InputError(
            f"{found}: set all three or none, to host 0's address with a port, such as "
            "10.0.0.1:8476, the number of processes, and the number of this one, from 0"
        )
    return address, int(count), int(index)


def _on_tpu() -> bool:
    """Whether JAX is to use TPUs; it sets this itself on a machine with chips and libtpu."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    return "tpu" in (platforms or "").split(",")


def is_main_host() -> bool:
    """Whether this is host 0, which alone writes files and logs; true on a single host."""
    return jax.process_index() == 0


def host_slice(count: int, host: int | None = None, hosts: int | None = None) -> slice:
    """This host's part of `count` things, in the hosts' order; parts differ by at most one thing.

    Where `count` divides over the hosts these are the rows of a batch that `batch_sharding` puts on
    this host's devices, as long as no tensor axis crosses hosts.
    """
    host = jax.process_index() if host is None else host
    hosts = jax.process_count() if hosts is None else hosts
    return slice(count * host // hosts, count * (host + 1) // hosts)


def from_all_hosts(value: Any) -> list[Any]:
    """The values of all hosts, in their order, on each; all hosts have to call it."""
    if jax.process_count() == 1:
        return [value]
    ours = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([ours.size]))[:, 0]
    every = multihost_utils.process_allgather(np.pad(ours, (0, sizes.max() - ours.size)))
    return [pickle.loads(one[:size].tobytes()) for one, size in zip(every, sizes, strict=True)]


def barrier(name: str, timeout: float = 600.0) -> None:
    """Wait for every host, up to `timeout` seconds.

    Raises:
        TimeoutError: names the hosts that did not come.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(f"flax_distil/{name}", int(timeout * 1000))
    except JaxRuntimeError as error:
        passed = "-th instance" in str(error)  # a host has called it again
        if not passed and "DEADLINE_EXCEEDED" not in str(error):
            raise
        _, _, late = str(error).partition("timed out task names:")
        numbers = late.partition("RPC")[0].split()
        if passed or str(jax.process_index()) in numbers:
            raise TimeoutError(
                f"barrier {name!r}: this host came after the others had waited and left"
            ) from None
        stored = _client().key_value_dir_get(HOST_NAMES)
        names = {key.rpartition("/")[2]: value for key, value in stored}
        who = ", ".join(f"host {n} ({names.get(n, 'name unknown')})" for n in numbers)
        raise TimeoutError(
            f"barrier {name!r}: {who} did not come within {timeout:g} s; {len(numbers)} of "
            f"{jax.process_count()} hosts missing: read their logs, then run again to resume"
        ) from None


def _client() -> Any:
    """The coordination service's client; JAX's public barrier has no time-out and no key-values."""
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise RuntimeError("several hosts and no coordinator: call multihost.start() first")
    return global_state.client


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """`Stop` for the run inside: SIGTERM, Ctrl-C or preemption end it.

    One host stops after the step at hand; a second signal interrupts as usual. On several hosts
    JAX's preemption service has SIGTERM (jax.distributed starts it): a notice to any host reaches
    all, which agree on a step that none has passed yet.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    stop, before = threading.Event(), {}

    def ask(number: int, _: Any) -> None:
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        stop.set()
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda _step: stop.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
