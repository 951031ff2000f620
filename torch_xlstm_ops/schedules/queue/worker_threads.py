"""Worker threads that outlive a call: started when first needed, shared by all callers, closed at exit."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from torch_xlstm_ops.runtime.state import on_reset

Work = Callable[[], None]  # must not raise
NAME = "xlstm-ops"


class WorkerThreads:
    """Threads that each may use `threads` intra-op threads, and take work in the order it was given."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def give(self, work: Work, copies: int) -> None:
        """Have `copies` threads call `work`; there are as many threads as were ever asked for at once."""
        with self._lock:
            if len(self._workers) < copies:
                self._grow(copies)
        for _ in range(copies):
            self._work.put(work)

    def close(self) -> None:
        """End the threads, after the work already given."""
        with self._lock:
            for _ in self._workers:
                self._work.put(None)
            for worker in self._workers:
                worker.join()
            self._workers.clear()

    def _grow(self, size: int) -> None:
        # set_num_threads acts on the calling thread, and on all threads not yet started: for those it is set back.
        default = _in_a_thread(torch.get_num_threads)
        ready = threading.Semaphore(0)
        new = [
            threading.Thread(target=self._serve, args=(ready,), name=f"{NAME}-{self.threads}-{number}", daemon=True)
            for number in range(len(self._workers), size)
        ]
        for worker in new:
            worker.start()
            ready.acquire()
        _in_a_thread(lambda: torch.set_num_threads(default))
        self._workers += new

    def _serve(self, ready: threading.Semaphore) -> None:
        torch.get_num_threads()  # a thread's first use of this sets it to the process's number, once
        torch.set_num_threads(self.threads)
        _here.worker = True
        ready.release()
        while (work := self._work.get()) is not None:
            work()
            del work  # holds a call's tensors


class _Here(threading.local):
    worker = False


_here = _Here()
_pools: dict[int, WorkerThreads] = {}
_lock = threading.Lock()


def get(threads: int) -> WorkerThreads:
    """Return the process's pool of workers with `threads` intra-op threads each."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = WorkerThreads(threads)
        return _pools[threads]


def inside() -> bool:
    """Return whether the calling thread is a worker, which must not wait for other workers."""
    return _here.worker


def close() -> None:
    """End all workers; a later call starts new ones."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close()


_T = TypeVar("_T")


def _in_a_thread(call: Callable[[], _T]) -> _T:
    found: list[_T] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def _forget() -> None:
    """Drop what a forked child inherits: threads do not survive a fork, and a lock may be held."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


atexit.register(close)
on_reset(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
