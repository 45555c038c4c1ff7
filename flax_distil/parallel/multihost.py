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
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from flax_distil.errors import InputError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30  # a killed host ends the others within a minute
CONNECT_SECONDS = 300  # hosts of a pod are set up and launched one after the other


class HostPlace(NamedTuple):
    """The coordinator, the number of processes, and the number of this one."""

    coordinator: str
    processes: int
    process: int


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = HEARTBEAT_SECONDS,
    connect: int = CONNECT_SECONDS,
    notices: bool = False,
) -> None:
    """Join the other hosts, before anything asks JAX for its devices; a second call does nothing.

    Args:
        coordinator: `address:port` of host 0; an argument outranks its environment variable.
        processes: number of processes.
        process: number of this one, from 0.
        heartbeat: seconds of silence after which a host counts as dead and the others end.
        connect: seconds to wait for all hosts to come.
        notices: whether SIGTERM is a notice that several hosts ask JAX for, as training does; else
            it does what it did before, where JAX would let it pass.

    Raises:
        InputError: some of the three are given and others lacking, or they contradict each other.
    """
    if jax.distributed.is_initialized():
        return
    place = find_place(coordinator, processes, process)
    if place is None and not _on_tpu():
        return
    if place is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        logger.info(
            "host %d of %d (%s) waits up to %d s for all of them at %s",
            place.process,
            place.processes,
            socket.gethostname(),
            connect,
            place.coordinator,
        )
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
    _announce()


def find_place(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> HostPlace | None:
    """This process's place by arguments, else by environment variables; None without either.

    Raises:
        InputError: some of the three are lacking, or they contradict each other.
    """
    given = {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": processes,
        "JAX_PROCESS_ID": process,
    }
    found = {
        name: os.environ.get(name) if value is None else value for name, value in given.items()
    }
    lacking = [name for name, value in found.items() if value in (None, "")]
    if len(lacking) == len(found):
        return None
    if lacking:
        given = ", ".join(name for name in found if name not in lacking)
        raise InputError(f"{given} is set and {', '.join(lacking)} is not: set all three or none")
    address = str(found["JAX_COORDINATOR_ADDRESS"])
    if not address.rpartition(":")[2].isdigit() or ":" not in address:
        raise InputError(f"coordinator {address} has no port: write {address}:8476")
    count = _whole("JAX_NUM_PROCESSES", found["JAX_NUM_PROCESSES"])
    index = _whole("JAX_PROCESS_ID", found["JAX_PROCESS_ID"])
    if not 0 <= index < count:
        raise InputError(f"process {index} of {count}: processes count from 0 to {count - 1}")
    return HostPlace(address, count, index)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"{name} = {value} must be a whole number") from None


def _on_tpu() -> bool:
    """Whether JAX is to use TPUs; it sets this itself on a machine with chips and libtpu."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    return "tpu" in (platforms or "").split(",")


def _announce() -> None:
    """Publish this host's name, and leave the information lines to host 0."""
    place = f"host {jax.process_index()} of {jax.process_count()}"
    _client().key_value_set(f"{_HOSTS}/{jax.process_index()}", socket.gethostname(), True)
    logger.info("%s is %s: %d devices", place, socket.gethostname(), jax.local_device_count())
    if not is_main_host():
        logging.getLogger("flax_distil").setLevel(logging.WARNING)


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
    from jax.experimental.multihost_utils import process_allgather

    ours = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = process_allgather(np.array([ours.size]))[:, 0]
    every = process_allgather(np.pad(ours, (0, sizes.max() - ours.size)))
    return [pickle.loads(one[:size].tobytes()) for one, size in zip(every, sizes, strict=True)]


def barrier(name: str, timeout: float = 600.0) -> None:
    """Wait for every host, up to `timeout` seconds; each `name` can be used once, so number them.

    Raises:
        TimeoutError: names the hosts that did not come.
        ValueError: this host was at a barrier of this name before.
    """
    if jax.process_count() == 1:
        return
    client, here = _client(), jax.process_index()
    arrived = f"flax_distil/barrier/{name}"
    try:
        client.key_value_set(f"{arrived}/{here}", "")
    except JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        raise ValueError(f"barrier {name!r} was used before: put the step into its name") from None
    try:
        client.wait_at_barrier(f"flax_distil/{name}", int(timeout * 1000))
    except JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        came = _stored(arrived)
        missing = [host for host in range(jax.process_count()) if host not in came]
        raise TimeoutError(_complaint(name, timeout, missing, _stored(_HOSTS))) from None


def _complaint(name: str, timeout: float, missing: list[int], names: dict[int, str]) -> str:
    if not missing:
        return (
            f"barrier {name!r}: this host came after the others had waited {timeout:g} s and left"
        )
    who = ", ".join(f"host {host} ({names.get(host, 'name unknown')})" for host in missing)
    return (
        f"barrier {name!r}: {who} did not come within {timeout:g} s; {len(missing)} of "
        f"{jax.process_count()} hosts missing: read their logs, then run again to resume"
    )


_HOSTS = "flax_distil/host"


def _stored(folder: str) -> dict[int, str]:
    """What each host has put under `folder` in the coordinator's key-value store."""
    entries = _client().key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): value for key, value in entries}


def _client() -> Any:
    """The coordination service's client; JAX's public barrier has no time-out and no key-values."""
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise RuntimeError("several hosts and no coordinator: call multihost.start() first")
    return global_state.client
