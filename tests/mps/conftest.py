"""Every test here runs generated Metal in a process of its own; two such processes work at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .emulator import build
from .emulator.requirements import missing
from .jobs import Job, Reports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.mps)


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> Iterator[Reports]:
    """Run the jobs of the collected tests ahead of the tests that read them."""
    if reason := missing():
        pytest.skip(reason)
    build.extension()
    reports = Reports()
    for item in request.session.items:
        for value in getattr(getattr(item, "callspec", None), "params", {}).values():
            if isinstance(value, Job):
                reports.start(value)
    yield reports
    reports.close()
