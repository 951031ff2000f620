"""Run a suite of benchmarks, and write the results: a table, JSON, a plot, and RESULTS.md.

    python -m benchmarks.run SUITE          # a name in benchmarks/README.md, or all
    python -m benchmarks.run all --quick    # small shapes, to check that everything runs

Each part runs in its own process. Its result is stored in benchmarks/results/, by suite and device, with the versions
and the commit; RESULTS.md is written from all stored results. A quick run is only shown, unless --json names a file.
Other packages are included if they are installed: pip install -e ".[peers]".
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.suites import SUITES, Part, on
from torch_xlstm_ops.runtime import devices

ROOT = Path(__file__).parent.parent
_WRITTEN = (":!benchmarks/results", ":!benchmarks/RESULTS.md")  # by this command


def run(part: Part, device: str, quick: bool) -> dict[str, Any]:
    """Return a part's result, and its error if it failed."""
    arguments = [*part.arguments[device], *(part.quick if quick else [])]
    if "--device" not in arguments:
        arguments += ["--device", device]
    with tempfile.TemporaryDirectory() as room:
        file = Path(room, "result.json")
        command = [sys.executable, "-m", f"benchmarks.{part.module}", *arguments, "--json", str(file)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        found: dict[str, Any] = {"module": part.module, "arguments": arguments}
        if done.returncode:
            found["error"] = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if file.exists():
            found["result"] = json.loads(file.read_text())
        return found


def commit() -> str:
    """Return the measured commit, with a + if files other than results differ from it; empty outside a checkout."""
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--quick", action="store_true", help="small shapes, one second each; kept nowhere")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    parser.add_argument("--json", type=Path, help="where to write the result too")
    parser.add_argument("--label", help="keep the result beside that of the same device type, as of another machine")
    parser.add_argument("--commit", help="the measured commit, where the files are a copy without git")
    given = parser.parse_args(arguments)
    device = devices.resolve_device(given.device).type
    found, measured = [], given.commit or commit()  # before the results change files
    today = datetime.date.today().isoformat()
    for suite in SUITES if given.suite == "all" else [given.suite]:
        parts = [run(part, device, given.quick) for part in on(suite, device)]
        kept = {"suite": suite, "device": device, "commit": measured, "date": today, "quick": given.quick,
                "parts": parts, **({"label": given.label} if given.label else {})}
        results.show(kept)
        found.append(kept)
        if not given.quick:
            results.keep(kept)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not given.quick:
        results.write()
    if failed := [part["module"] for kept in found for part in kept["parts"] if "error" in part]:
        raise SystemExit(f"no result of: {', '.join(failed)}")


if __name__ == "__main__":
    main()
