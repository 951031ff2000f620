"""Programs of which none imports torch anew: one process imports it, and forks a child for each program.

A child has its own arguments, variables, folder and files, and ends as an interpreter does: with a traceback at an
error, and after its output is flushed. What is about imports, about variables that Python or torch read when they
start, or about a first run on a machine needs a process of its own instead.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLOSED, UNREAD = "closed", "unread"  # for an output: no descriptor, and a pipe that nobody reads
# Each line that it reads is a program; for each it writes a line with the exit status. After the loop is a child.
SERVER = """
import json, os, runpy, sys
import torch, torch._inductor.compile_fx
answers = os.dup(1)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    os._exit(0)
os.close(answers)
os.environ.clear()
os.environ.update(asked["environment"])
os.chdir(asked["folder"])
for number, name, target in (0, "stdin", os.devnull), (1, "stdout", asked["stdout"]), (2, "stderr", asked["stderr"]):
    stream = None  # as Python has it where the descriptor is closed
    if target == "closed":
        os.close(number)
    else:
        if target == "unread":
            unread, opened = os.pipe()
            os.close(unread)
        else:
            opened = os.open(target, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
        buffering, errors = (1, "backslashreplace") if name == "stderr" else (-1, "strict")
        stream = open(number, "w" if number else "r", buffering, "utf-8", errors, closefd=False)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
first, *rest = asked["arguments"]
start = {"-m": asked["folder"], "-c": ""}.get(first, os.path.dirname(first))
sys.path[:1] = [start, asked["root"]]
if first == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
elif first == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
else:
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")
"""


class Forked:
    """The process that forks; starts it."""

    def __init__(self) -> None:
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(
        self, *arguments: object, folder: Path, environment: Mapping[str, str] = os.environ, stdout: str = "",
        stderr: str = "", seconds: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program and return what it left.

        arguments: as after ``python``: a file, or -m and a module, or -c and a program, then its own.
        stdout, stderr: a file, CLOSED or UNREAD; by default what is written there is returned.
        """
        with tempfile.TemporaryDirectory() as kept:
            written = {"stdout": Path(kept) / "stdout", "stderr": Path(kept) / "stderr"}
            for file in written.values():
                file.touch()
            asked = {"arguments": [*map(str, arguments)], "folder": str(folder), "root": str(ROOT),
                     "environment": {**environment}, "stdout": stdout or str(written["stdout"]),
                     "stderr": stderr or str(written["stderr"])}
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.write(json.dumps(asked).encode() + b"\n")
            self._server.stdin.flush()
            if not select.select([self._server.stdout], [], [], seconds)[0]:
                self.close()
                raise TimeoutError(f"a program must end within {seconds:g} s: {asked['arguments']}")
            answer = self._server.stdout.readline()
            assert answer, "the process that forks has ended"
            found = {name: file.read_text(errors="replace") for name, file in written.items()}
            return subprocess.CompletedProcess(asked["arguments"], int(answer), **found)

    def close(self) -> None:
        """End the process and its child."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate(timeout=60)


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Yield what runs programs; one process for all tests."""
    if not hasattr(os, "fork"):
        pytest.skip("forking needs POSIX")
    forked = Forked()
    yield forked
    forked.close()
