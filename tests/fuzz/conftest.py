"""Bounds of memory, and the table of what came of the damaged files."""

import re
import resource
from pathlib import Path

import pytest

from tests.fuzz.damage import FAILURES, TALLIES

ROOM = 6 << 30  # bytes that a test may take beside those that the process has


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def bounded():
    """A file that asks for more memory than there is ends in a MemoryError, not in a machine that swaps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """In a full run, what went wrong with single files, each kind of fault once."""
    FAILURES.clear()
    result = yield
    if FAILURES:
        different = {re.sub(r".*\((.*)\)$", r"\1", failure): failure for failure in FAILURES}
        pytest.fail("\n".join([f"{len(FAILURES)} files", *different.values()]), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter):
    if not TALLIES:
        return
    row = "{:<34}{:>8}{:>10}{:>14}{:>8}".format
    terminalreporter.write_line("")
    terminalreporter.write_line(row("format", "files", "refused", "loaded right", "wrong"))
    for kind, tally in sorted(TALLIES.items()):
        terminalreporter.write_line(row(kind, tally.files, tally.refused, tally.right, tally.wrong))
