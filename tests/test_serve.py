"""`transformers serve` through `xlstm-ops run`: the embedded model answers over HTTP, several requests at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from torch_xlstm_ops.models import DEMO_MODEL

LIMIT = 240  # seconds for the server to begin, and for an answer
for package in ("transformers", "fastapi", "uvicorn", "openai", "jinja2"):
    pytest.importorskip(package, reason=f"needs the package {package}")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "torch_xlstm_ops", "run", "--only", "transformers", "-m",
               "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server did not begin:\n{log.read_text()}")


def ask(address: str, content: str, **options: Any) -> str:
    """Return the body of the answer to a message."""
    question = {"model": str(DEMO_MODEL), "messages": [{"role": "user", "content": content}], "max_tokens": 16}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(question | options).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT) as answer:
        body: str = answer.read().decode()
    return body


@pytest.mark.slow
def test_the_embedded_model_chats(address: str) -> None:
    usage = json.loads(ask(address, "hi"))["usage"]
    assert usage["prompt_tokens"] == len("# user: hi\n# assistant:")
    assert 0 < usage["completion_tokens"] <= 16


@pytest.mark.slow
def test_an_answer_streams(address: str) -> None:
    lines = [line.removeprefix("data: ") for line in ask(address, "hi", stream=True).splitlines() if line]
    chunks = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(chunks) > 2
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.slow
def test_four_at_once_are_answered(address: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda n: ask(address, "x" * n), range(1, 5)))
    assert [json.loads(body)["usage"]["prompt_tokens"] for body in bodies] == [
        len("# user: \n# assistant:") + n for n in range(1, 5)]
