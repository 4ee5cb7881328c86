"""Faults that were injected, how often, and what was lost, as a table at the end: `python -m pytest tests/faults`."""

from collections import Counter

import pytest

from engine.reports.report import markdown_table

INJECTED: Counter[str] = Counter()
LOST: dict[str, list[str]] = {}


@pytest.fixture
def injected(request):
    """Counts a fault; what a test that has injected one fails on is lost."""
    kinds = []

    def count(kind, times=1):
        kinds.append(kind)
        INJECTED[kind] += times

    request.node.faults = kinds
    return count


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and report.failed:
        for kind in getattr(item, "faults", ()):
            LOST.setdefault(kind, []).append(item.name)


def pytest_terminal_summary(terminalreporter):
    rows = [
        {"injected": k, "times": str(n), "lost": ", ".join(LOST.get(k, ())) or "nothing"} for k, n in INJECTED.items()
    ]
    if rows:
        terminalreporter.write_line(f"\n{markdown_table(rows)}")
