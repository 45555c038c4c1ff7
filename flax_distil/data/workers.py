"""Pools for decoding: threads, or processes where threads are too slow.

FFmpeg releases the GIL, but the code around it holds it for half of a clip's time (docs/LOG.md):
threads prepare about twice as many clips a second as one thread, on any number of cores. Processes
scale further, but take seconds to start and copy what they decode.
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any


def open_pool(function: Callable, threads: int, processes: int = 0) -> tuple[Executor, Callable]:
    """An executor, and the callable to submit to it for `function`.

    processes: used instead of threads if above 0; each receives `function` once.
    """
    if not processes:
        return ThreadPoolExecutor(threads, thread_name_prefix="loader"), function
    return ProcessPoolExecutor(
        processes, get_context("spawn"), _start_worker, (function,)
    ), _call_function


_function: Any = None  # of a worker process


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a run that is asked to stop still needs its batches
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot close the pool."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call_function(*arguments: Any) -> Any:
    return _function(*arguments)
