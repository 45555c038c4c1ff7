"""Stopping a run by SIGTERM, Ctrl-C or preemption; several hosts stop after the same step."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

Stop = Callable[[int], bool]
"""Whether to stop before the next step; asked after each step, by every host."""


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """`Stop` for the run inside.

    One host stops by SIGTERM or Ctrl-C after the step at hand; a second signal interrupts as usual.
    On several hosts JAX's preemption service has SIGTERM (jax.distributed starts it): a notice to
    any host reaches all, which agree on a step that none has passed yet.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    stop, before = threading.Event(), {}

    def ask(number: int, _: Any) -> None:
        log.warning("%s: stopping after this step", signal.Signals(number).name)
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
