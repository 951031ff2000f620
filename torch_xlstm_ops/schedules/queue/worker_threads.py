"""Worker threads shared by all callers: started when first needed, kept between calls, joined at exit."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from torch_xlstm_ops.runtime import forks
from torch_xlstm_ops.runtime.state import on_reset

Work = Callable[[], None]  # must not raise
NAME = "xlstm-ops"


class WorkerThreads:
    """Threads that use `threads` intra-op threads each, and run work in the order of submission."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._lock = forks.new_lock()

    def submit(self, work: Work, copies: int) -> None:
        """Have `copies` threads call `work`; start threads if there are fewer."""
        with self._lock:
            if len(self._workers) < copies:
                self._grow(copies)
        for _ in range(copies):
            self._work.put(work)

    def close(self) -> None:
        """Join the threads after the work already submitted."""
        with self._lock:
            for _ in self._workers:
                self._work.put(None)
            for worker in self._workers:
                worker.join()
            self._workers.clear()

    def _grow(self, size: int) -> None:
        # set_num_threads acts on the calling thread and sets the default of threads not yet started: restore that.
        default = _in_new_thread(torch.get_num_threads)
        ready = threading.Semaphore(0)
        new = [
            threading.Thread(target=self._serve, args=(ready,), name=f"{NAME}-{self.threads}-{number}", daemon=True)
            for number in range(len(self._workers), size)
        ]
        for worker in new:
            worker.start()
            ready.acquire()
        _in_new_thread(lambda: torch.set_num_threads(default))
        self._workers += new

    def _serve(self, ready: threading.Semaphore) -> None:
        torch.get_num_threads()  # the first call in a thread sets it to the process's number
        torch.set_num_threads(self.threads)
        _local.worker = True
        ready.release()
        while (work := self._work.get()) is not None:
            work()
            del work  # refers to a call's tensors


class _ThreadLocal(threading.local):
    worker = False


_local = _ThreadLocal()
_by_size: dict[int, WorkerThreads] = {}
_lock = forks.new_lock()


def get(threads: int) -> WorkerThreads:
    """Return the process's workers with `threads` intra-op threads each."""
    with _lock:
        if threads not in _by_size:
            _by_size[threads] = WorkerThreads(threads)
        return _by_size[threads]


def is_worker() -> bool:
    """Return whether the calling thread is a worker; a worker must not wait for other workers."""
    return _local.worker


def close() -> None:
    """Join all workers; a later call starts new ones."""
    with _lock:
        all_workers = list(_by_size.values())
        _by_size.clear()
    for workers in all_workers:
        workers.close()


_T = TypeVar("_T")


def _in_new_thread(call: Callable[[], _T]) -> _T:
    found: list[_T] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


atexit.register(close)
on_reset(close)
forks.in_child(_by_size.clear)  # threads do not survive a fork
