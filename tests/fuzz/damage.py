"""How files are damaged, and what must come of it: the right content or one line that names the file."""

import faulthandler
import json
import math
import os
import signal
import struct
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity.errors import UserError

FULL = os.environ.get("HYPOTHESIS_PROFILE") == "full"
SECONDS = 30  # that a file may take
fuzzed = settings(
    max_examples=330 if FULL else 30,  # more than 300 are left where hypothesis draws some twice
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Tally:
    """Counts of what came of the files of a format. wrong: another content, another exception, or a hang."""

    files: int = 0
    refused: int = 0
    right: int = 0

    @property
    def wrong(self) -> int:
        return self.files - self.refused - self.right


FAILURES: list[str] = []  # of the test that runs, where all its files are to be counted
TALLIES: dict[str, Tally] = defaultdict(Tally)


def check(kind: str, file: Path | str, load: Callable[[], Any], right: Callable[[Any], bool]) -> None:
    """Count what `load` makes of a damaged file of this format: `right` of it, or a UserError with its name.

    What is wrong fails at once, so that hypothesis finds the smallest such file; in a full run, after all files.
    """
    try:
        _check(TALLIES[kind], file, load, right)
    except (Exception, TooSlow) as error:
        if not FULL:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        FAILURES.append(f"{kind}: {type(error).__name__}: {error!s:.200} ({last.filename}:{last.lineno})")


def _check(tally: Tally, file: Path | str, load: Callable[[], Any], right: Callable[[Any], bool]) -> None:
    tally.files += 1
    try:
        with at_most(SECONDS):
            found = load()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"more than one line: {error}"
        assert Path(file).name in str(error), f"does not name the file: {error}"
        tally.refused += 1
        return
    assert right(found), f"wrong content: {found!r:.500}"
    tally.right += 1


class TooSlow(BaseException):
    """A file took longer than it may; nothing that catches errors may catch this."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block after so long; end the process where that is no help."""

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def same(one: Any, other: Any) -> bool:
    """Whether plain values and tensors are the same, bit by bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


# Bytes


@st.composite
def damaged_bytes(draw: Callable, content: bytes) -> bytes:
    """The content with one to three faults, more of them near its ends, where formats have what describes the rest."""
    for _ in range(draw(st.integers(1, 3))):
        content = draw(one_fault(content))
    return content


@st.composite
def one_fault(draw: Callable, content: bytes) -> bytes:
    size = len(content)
    if not size:
        return draw(st.binary(min_size=1, max_size=8))
    anywhere = st.integers(0, size - 1)
    start = draw(st.one_of(anywhere, st.integers(0, min(size, 300) - 1), st.integers(max(0, size - 300), size - 1)))
    stop = min(size, start + draw(st.integers(1, 64)))
    head, part, tail = content[:start], content[start:stop], content[stop:]
    return draw(
        st.one_of(
            st.integers(0, 7).map(lambda bit: head + bytes([part[0] ^ 1 << bit]) + part[1:] + tail),
            st.integers(0, 255).map(lambda byte: head + bytes([byte]) + part[1:] + tail),
            st.just(head),  # cut off
            st.just(head + tail),
            st.just(head + part + part + tail),
            st.just(head + part[::-1] + tail),
            st.just(head + bytes(len(part)) + tail),
            st.just(content + part),
            st.just(content + content),
            st.binary(min_size=1, max_size=16).map(lambda other: head + other + part + tail),
            st.sampled_from((b"[" * 200_000, b'{"a":' * 200_000, b"9" * 6000, b"\xff\xfe", b"\x00")).map(
                lambda other: head + other + tail
            ),
        )
    )


# JSON

ODD = st.sampled_from(
    (
        *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**400, 0.5, 1e308, math.nan, math.inf, -math.inf),
        *("", "x", "a\nb", "\x00", "\ud800", "1", "-1", "nan", "é" * 300, "../../etc/passwd", "x" * 5000),
        *([], {}, [[]], [None], [1, 2, 3], {"a": 1}, [{}], [[0, 0, 4, 4]], ["a", 1], [-1, 4], [2**40, 2**40], [0]),
    )
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside, keys and numbers."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple, new: Any) -> Any:
    """The value with another one at the path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple) -> Any:
    holder = at(value, path[:-1]).copy()
    del holder[path[-1]]
    return put(value, path[:-1], holder)


def twice(value: Any, path: tuple) -> Any:
    """A list's item two times; a mapping's under another name, too."""
    holder, key = at(value, path[:-1]).copy(), path[-1]
    if isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[f"{key}2"] = holder[key]
    return put(value, path[:-1], holder)


@st.composite
def damaged_json(draw: Callable, value: Any, odd: st.SearchStrategy = ODD) -> Any:
    """The value with one or two of its parts replaced, left out, doubled, renamed or exchanged."""
    for _ in range(draw(st.integers(1, 2))):
        paths = list(places(value))
        path, other = draw(st.sampled_from(paths)), draw(st.sampled_from(paths))
        fault = draw(st.sampled_from((put, put, without, twice, "exchange")))
        if fault is put or not path:
            value = put(value, path, draw(odd))
        elif fault == "exchange":
            value = put(value, path, at(value, other))
            nested = other[: len(path)] == path or path[: len(other)] == other
            value = value if nested else put(value, other, at(value, path))
        else:
            value = fault(value, path)
    return value


# safetensors


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, tensors: bytes) -> bytes:
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + tensors


@st.composite
def damaged_safetensors(draw: Callable, content: bytes, *described: str) -> bytes:
    """Damaged bytes, header, or JSON in the entries `described` of the metadata."""
    kind = draw(st.sampled_from(("bytes", "header", "dtype", *described)))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    header, tensors = split(content)
    if kind == "header":
        return joined(draw(damaged_json(header)), tensors)
    if kind == "dtype":
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        dtypes = ("BOOL", "U8", "I8", "F8_E4M3", "F8_E8M0", "F4", "F16", "BF16", "F32", "I32", "U32", "F64", "C64", "?")
        return joined(put(header, (name, "dtype"), draw(st.sampled_from(dtypes))), tensors)
    inner = draw(damaged_json(json.loads(header["__metadata__"][kind])))
    return joined(put(header, ("__metadata__", kind), json.dumps(inner)), tensors)


def replaced_metadata(content: bytes, change: Callable[[dict], dict]) -> bytes:
    header, tensors = split(content)
    return joined({**header, "__metadata__": change(header["__metadata__"])}, tensors)
