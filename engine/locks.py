"""One run at a time in an output folder: a small file there names the process that holds it.

The file is only read and written under a short lock of the system, so that of two runs that begin together one is
refused. A holder on the same machine is gone when its process is; one on another machine, when it no longer touches the
file.
"""

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: without the moment's lock
    fcntl = None

from sparsity.errors import UserError
from sparsity.files import clear_leftovers, writing

NAME = "running.lock"
BEAT = 20.0  # seconds from touch to touch
SILENCE = 300.0  # seconds without a touch after which a holder on another machine is gone


@dataclass(frozen=True)
class Holder:
    """A process: machine, its boot and process number, with the time at which the process began, in clock ticks."""

    host: str
    boot: str
    pid: int
    began: str
    since: str  # for the reader

    def is_gone(self, silent: float) -> bool:
        """Return whether the process is gone. silent: seconds since the file was touched."""
        if self.host != socket.gethostname():
            return silent > SILENCE
        return self.boot != _boot() or self.began != _began(self.pid)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _began(pid: int) -> str:
    """Return when a process of this machine began, since numbers are reused; "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"


def _self() -> Holder:
    pid = os.getpid()
    return Holder(socket.gethostname(), _boot(), pid, _began(pid), time.strftime("%Y-%m-%d %H:%M:%S"))


class FolderLock:
    """Hold a folder until `release`, and remove the half-written files of a killed run from it.

    UserError, naming the holder, where another run has the folder.
    """

    def __init__(self, folder: Path):
        self.path, self.holder = folder / NAME, _self()
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder)
        clear_leftovers(folder)
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="output folder").start()

    def _take(self, folder: Path) -> None:
        with _alone(self.path) as handle:
            other = _read(handle)
            silent = time.time() - os.fstat(handle).st_mtime
            if other is not None and not _same(other, self.holder) and not other.is_gone(silent):
                raise UserError(
                    f"{folder}: another run is writing here (process {other.pid} on {other.host}, since {other.since}):"
                    f" wait for it, or choose another folder; if it is gone for certain, delete {self.path}"
                )
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(self.holder)).encode(), 0)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:  # removed by hand, or a file system that is away for a moment
                continue

    def release(self) -> None:
        """Remove the file, if it is still ours, and the folders that were made for it, if nothing else is in them."""
        self._released.set()
        if self.path.exists() and os.getpid() == self.holder.pid:
            with _alone(self.path) as handle:
                if _read(handle) == self.holder:
                    self.path.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break


def _same(one: Holder, other: Holder) -> bool:
    return (one.host, one.boot, one.pid, one.began) == (other.host, other.boot, other.pid, other.began)


def _read(handle: int) -> Holder | None:
    """Return the holder of the file; None if there is none, or a process died while it wrote."""
    try:
        return Holder(**json.loads(os.pread(handle, 10_000, 0)))
    except (ValueError, TypeError):
        return None


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Open the file, and lock it for a moment if the file system can."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                with suppress(OSError):  # file systems without locks
                    fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                yield handle
                return
        finally:
            os.close(handle)


_held: dict[Path, FolderLock] = {}


def hold(folder: Path) -> None:
    """Hold a folder until `release_all`, or the end of the process."""
    key = Path(os.path.abspath(folder))
    if key not in _held:
        _held[key] = FolderLock(folder)


@atexit.register
def release_all() -> None:
    """Give all folders back."""
    while _held:
        _held.popitem()[1].release()
