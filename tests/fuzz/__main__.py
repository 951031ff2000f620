"""Run the campaign: one line for each unexplained difference, with its seed, and a count of the reasons at the end."""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.fuzz.draws import draw
from tests.fuzz.judge import Unexplained, judge


def run(calls: int, seed: int, seconds: float = float("inf")) -> tuple[Counter[str], list[str]]:
    """Judge `calls` drawn calls, fewer if `seconds` have passed; return the reasons with their counts, and what is
    unexplained.
    """
    reasons: Counter[str] = Counter()
    unexplained: list[str] = []
    until = time.monotonic() + seconds
    for number in range(seed, seed + calls):
        if time.monotonic() > until:
            break
        call = draw(number)
        try:
            reasons[judge(call)] += 1
        except (Unexplained, ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            unexplained.append(f"seed {number}: {call}: {type(error).__name__}: {first}")
            print(unexplained[-1], flush=True)
    return reasons, unexplained


def main() -> int:
    """Run the command; return 1 if a difference is unexplained."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next has the next one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no call later")
    parsed = parser.parse_args()
    reasons, unexplained = run(parsed.calls, parsed.seed, parsed.seconds)
    for reason, count in reasons.most_common():
        print(f"{count:7}  {reason}")
    print(f"{sum(reasons.values()) + len(unexplained):7}  calls from seed {parsed.seed} on, {len(unexplained)} "
          "unexplained")
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
