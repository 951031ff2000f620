"""Jobs in new processes: the emulated device cannot be unregistered, and Inductor's Metal headers leak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 500
PARALLEL = min(2, os.cpu_count() or 1)
ENVIRONMENT = dict(os.environ)  # read once: pytest changes a variable for each test, while threads start jobs


class Job(NamedTuple):
    """One task of `worker.py`; `arguments` is JSON, so that equal jobs are one job."""

    task: str
    arguments: str

    def __str__(self) -> str:
        return " ".join([self.task, *(str(value) for value in json.loads(self.arguments).values())])


def job(task: str, **arguments: Any) -> Job:
    """Return the job that runs `task` of the worker with keyword `arguments`."""
    return Job(task, json.dumps(arguments, sort_keys=True))


def run(wanted: Job, **environment: str) -> dict[str, Any]:
    """Run a job in a new process and return its report; raise RuntimeError with its last words if it dies."""
    command = [sys.executable, "-m", "tests.mps.worker", wanted.task, wanted.arguments]
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), ENVIRONMENT.get("PYTHONPATH")]))
    variables = {
        **ENVIRONMENT, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        **environment,
    }
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{wanted} ended with {done.returncode}:\n{done.stderr[-6000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class Reports:
    """The reports of jobs, each run once: those started beforehand `PARALLEL` at a time, any other when asked for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(PARALLEL)
        self._started: dict[Job, Future[dict[str, Any]]] = {}
        self._done: dict[Job, dict[str, Any]] = {}

    def start(self, wanted: Job) -> None:
        """Queue a job."""
        if wanted not in self._started:
            self._started[wanted] = self._pool.submit(run, wanted)

    def __call__(self, wanted: Job) -> dict[str, Any]:
        """Return a job's report, waiting for it."""
        if wanted in self._started:
            return self._started[wanted].result(TIMEOUT_S * 2)
        if wanted not in self._done:
            self._done[wanted] = run(wanted)
        return self._done[wanted]

    def close(self) -> None:
        """Drop what has not started."""
        self._pool.shutdown(cancel_futures=True)
