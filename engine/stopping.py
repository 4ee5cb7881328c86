"""SIGTERM and SIGUSR1, which schedulers send before they kill a run: it saves, and ends so that it can be resumed.

Signals are the process's, so this module keeps the one state that there is of them.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """The run was asked to stop; what was done is saved. No `Exception`: nothing that handles errors may keep it."""


class _State:
    asked = ""  # name of the signal that came
    waits = False  # whether a signal is only noted, and raised later
    process = 0  # id of the process that listens: forked children inherit the handler


@contextmanager
def listening() -> Iterator[None]:
    """Inside the block a signal raises Stopped wherever the program is, unless it is `deferred`."""
    _State.asked, _State.waits, _State.process = "", False, os.getpid()
    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _come) for number in SIGNALS} if own else {}
    try:
        yield
    finally:
        _State.asked = ""
        for number, handler in before.items():
            signal.signal(number, handler)


def _come(number: int, _: Any) -> None:
    if os.getpid() != _State.process:
        return
    _State.asked = signal.Signals(number).name
    if not _State.waits:
        raise Stopped(_State.asked)


def asked() -> str:
    """Return the name of the signal that was received; "" if there was none."""
    return _State.asked


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a signal is only noted, for `asked`; at the end it raises Stopped, where nothing else did."""
    yield from _waiting(True)
    if _State.asked and not _State.waits:
        raise Stopped(_State.asked)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside the block a signal raises Stopped, also within a `deferred` one: what was done is saved."""
    if _State.asked and _State.waits:
        raise Stopped(_State.asked)
    yield from _waiting(False)


def _waiting(waits: bool) -> Iterator[None]:
    before, _State.waits = _State.waits, waits
    try:
        yield
    finally:
        _State.waits = before
