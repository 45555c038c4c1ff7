"""Pools for decoding: threads, or processes where threads are too slow.

FFmpeg releases the GIL, but the code around it holds it for half of a clip's time (docs/LOG.md):
threads prepare about twice as many clips a second as one thread, on any number of cores. Processes
scale further, but take seconds to start and copy what they decode.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat, takewhile
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Generator[Result]:
    """`map` in threads, in order, up to `ahead` items before the consumer asks for them."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # also when the consumer stops early
        pool.shutdown(cancel_futures=True)


def prefetch(items: Iterable[Item], count: int) -> Generator[Item]:
    """The items in order, up to `count` of them read in advance by a thread."""
    source, end = iter(items), object()
    with closing(map_in_order(lambda _: next(source, end), repeat(None), 1, count)) as read:
        yield from takewhile(lambda item: item is not end, read)  # type: ignore[misc]


def open_pool(function: Callable, threads: int, processes: int = 0) -> tuple[Executor, Callable]:
    """An executor, and the callable to submit to it for `function`.

    processes: used instead of threads if above 0; each receives `function` once.
    """
    if not processes:
        return ThreadPoolExecutor(threads, thread_name_prefix="loader"), function
    context = get_context("spawn")
    return ProcessPoolExecutor(processes, context, _start_worker, (function,)), _call_function


_function: Any = None  # of a worker process


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM):  # a run that is stopped still needs its batches
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
