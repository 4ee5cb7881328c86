"""Files that are whole or not there: written beside their place, then renamed."""

import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsity.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what is written there takes the place of `path` when the block ends.

    On an exception nothing is left behind, and an older `path` stays as it was. A kill leaves the temporary file, which
    `remove_leftovers` removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is chosen before the file is there, so that an interrupt at any moment finds what to remove.
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers give no one else the right to read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say for which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends; on an exception nothing is left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed processes left of `path`; for files that one process at a time writes."""
    path = Path(path)
    for temporary in path.parent.glob(f"{_prefix(path)}*"):
        temporary.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.tmp-"


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_archive(path: str | Path) -> None:
    """Raise UserError where a file that `torch.save` wrote is not as it was written, which torch itself does not check.

    Files in the format before torch 1.6 have no checksums, nor have those that were written without; they pass.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = any(entry.CRC for entry in archive.infolist()) and archive.testzip()
    except Exception as error:  # zipfile and zlib raise half a dozen kinds
        raise UserError(f"{path}: damaged archive ({type(error).__name__})") from error
    if damaged:
        raise UserError(f"{path}: damaged archive ({damaged} is not as it was written)")


def check_writable(folder: str | Path, option: str) -> None:
    """UserError naming the option unless files can be written to `folder`, which need not exist; it is not made."""
    existing = Path(os.path.abspath(folder))
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is not a folder; choose another {option}")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror}); choose another {option}"
        raise UserError(f"{option} {folder}: {reason}") from None
