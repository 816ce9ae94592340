"""Jobs in several processes, as many at a time as there is room for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
KILLED = "its process was killed, most likely for want of memory; fewer `--processes` leave more for each"


def in_processes(
    run: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    processes: int,
    threads: int,
    wanted: Callable[[Job], bool] = lambda job: True,
) -> Generator[tuple[Job, Result | str]]:
    """`run` of every job, as they finish; `KILLED` where its process did not survive, which the others do.

    A job that is not `wanted` any more when its turn comes is passed over. Closing the iterator ends all processes, and so does
    the end of this one, whatever ends it.

    Args:
        run: A function of a module, for new processes import it. It must not raise.
        threads: torch's threads in each process.
    """
    waiting = deque(jobs)
    while waiting:
        lost = []
        for job, result in _in_pool(run, waiting, processes, threads, wanted):
            if result is None:
                lost.append(job)  # one of those that were running did it: which one shows when each runs alone
            else:
                yield job, result
        for job in lost:
            for _, result in _in_pool(run, deque([job]), 1, threads, wanted):
                yield job, KILLED if result is None else result


def _in_pool(
    run: Callable[[Any], Any], waiting: deque[Any], processes: int, threads: int, wanted: Callable[[Any], bool]
) -> Iterator[tuple[Any, Any]]:
    """Takes jobs from `waiting` until none is left or the pool breaks; None as the result of those that were running then."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (threads,))
    running: dict[Future[Any], Any] = {}
    finished = False
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                if wanted(waiting[0]):
                    running[pool.submit(run, waiting[0])] = waiting[0]
                waiting.popleft()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=_is_broken):  # what is finished counts
                if _is_broken(future):
                    yield from ((job, None) for job in running.values())
                    return
                yield running.pop(future), future.result()
        finished = True
    except BrokenProcessPool:  # by a process that had nothing to do
        yield from ((job, None) for job in running.values())
    finally:
        if not finished:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _is_broken(future: Future[Any]) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


def _start(threads: int) -> None:
    # Ctrl-C goes to the whole group of processes; the one that the user started decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # what a method or a library warns of, every run would say again
    import torch
    from tqdm import tqdm

    # tqdm's own lock is a semaphore of the system, which a process that is ended would leave behind.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
