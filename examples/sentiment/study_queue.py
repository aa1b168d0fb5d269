"""Tasks on some processes, until all are done or the time is up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import torch
import transformers

Task = TypeVar("Task")
Result = TypeVar("Result")


class InThisProcess(Executor):
    """For one process: a submitted task is done at once."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def executor_of(processes: int) -> Iterator[Executor]:
    """Each process has one thread, since one with two threads is slower for so small a model."""
    if processes == 1:
        begin_process(0)
        yield InThisProcess()
        return
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")  # read when a process imports
    parent = os.getpid()
    context = get_context("spawn")  # a fork after torch has made threads may hang
    with ProcessPoolExecutor(processes, context, begin_process, (parent,)) as executor:
        yield executor


def begin_process(parent: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if parent:
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A killed parent cannot tell its processes to end."""
    if parent := parent_process():
        parent.join()
        os._exit(1)


class Clock:
    """Whether there is time for one more task, by the longest so far."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def has(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self.end


def work(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    executor: Executor,
    processes: int,
    clock: Clock,
) -> Iterator[tuple[Task, Result]]:
    """Results as they come; begins no task that would probably end after the time is up."""
    waiting, running = iter(tasks), {}
    began, longest = {}, 0.0
    while True:
        while len(running) < processes and clock.has(longest):
            if (task := next(waiting, None)) is None:
                break
            began[task] = time.monotonic()
            running[executor.submit(function, task)] = task
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            longest = max(longest, time.monotonic() - began[task])
            yield task, future.result()
