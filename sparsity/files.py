"""Files that are whole or not there: written beside their place, then renamed. What the system refuses is one line.

A full disk, a quota, a limit of the process or too little memory is a `ResourceError`, whichever library was writing; a
file of the user's that cannot be read or written is a `UserError`.
"""

import errno
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from sparsity.errors import MissingFileError, ResourceError, UserError, listed

# What the system says when something is used up.
USED_UP = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "ENOMEM", "EMFILE", "ENFILE") if hasattr(errno, name)
}
REFUSED = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors passes it on
_LEFTOVER = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")  # as `replacing` names what it writes
_CUT_SHORT = re.compile(r"inline_container|iostream error|file write failed")  # torch.save, which says no more

SAVED = ("model.safetensors", "pytorch_model.bin")  # as transformers names the weights of a folder
INDEX = ".index.json"  # what the list of shards beside them ends with


def weights_files(path: str | Path) -> list[Path]:
    """Return the files with the weights that a path stands for: itself, the shards of an index (*.index.json), or those
    of a folder that has either under the names of `SAVED`; none where there is nothing.

    Raises MissingFileError for an index one of whose shards is not there, UserError for one that is damaged.
    """
    path = Path(path)
    if path.name.endswith(INDEX) and path.is_file():
        return _shards(path)
    if not path.is_dir():
        return [path] if path.is_file() else []
    for name in SAVED:
        stem, suffix = name.rsplit(".", 1)
        whole, index = path / name, path / f"{name}{INDEX}"
        if whole.is_file():
            return [whole]
        found = _shards(index) if index.is_file() else sorted(path.glob(f"{stem}-?????-of-?????.{suffix}"))
        if found:
            return found
    return []


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index of shards names; UserError where it is damaged or names none."""
    try:
        with reading(index):
            places = json.loads(index.read_bytes())["weight_map"]
        names = sorted({Path(place).name for place in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of shards, {{'weight_map': {{name: file}}}} ({error!r:.80})") from None
    if not names:
        raise MissingFileError(f"{index}: it names no shard")
    return names


def _shards(index: Path) -> list[Path]:
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        told = f"{len(missing)} of {len(names)} shards are not there: {listed(missing)}"
        raise MissingFileError(f"{index}: {told}")
    return [index.parent / name for name in names]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; what is written there takes the place of `path` when the block ends.

    On an exception nothing is left behind, and an older `path` stays as it was. A kill leaves the temporary file, which
    `remove_leftovers` and `clear_leftovers` remove. Raises ResourceError or UserError as `writing`.
    """
    path = Path(path)
    with writing(path):
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
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends; on an exception nothing is left."""
    path = Path(path)
    with writing(path):
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


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside the block a file is written: ResourceError where there is no room, UserError where it is not allowed."""
    before = sys.exception()
    try:
        yield
    except Exception as error:
        came = _interruption(error, before)
        if came is not None:
            raise came from None
        elsewhere = getattr(error, "filename", None)  # what is written may be read from other files
        own = elsewhere is None or Path(os.fsdecode(elsewhere)).parent in (Path(path).parent, *Path(path).parents)
        known = (_refusal(error, path, "written") if own else None) or _used_up(error, path)
        if known is None:
            raise
        raise known from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Inside the block a file of the user's is read: UserError, or MissingFileError, where it cannot be."""
    try:
        yield
    except OSError as error:
        known = _refusal(error, path, "read") or _used_up(error, path)
        if known is None:
            known = UserError(f"{path}: cannot be read ({error.strerror or error})")
        raise known from error


def _interruption(error: Exception, before: BaseException | None) -> BaseException | None:
    """Return what a signal raised while `torch.save` wrote (Ctrl-C, a stop, a killed process): torch only says that the
    file is cut short, as it does where there is no room. before: what was being handled when the writing began.
    """
    if not (isinstance(error, RuntimeError) and _CUT_SHORT.search(str(error))):
        return None
    behind = takewhile(lambda e: e is not before, _chain(error))
    return next((e for e in behind if not isinstance(e, OSError) and not _CUT_SHORT.search(str(e))), None)


def _refusal(error: Exception, path: str | Path, done: str) -> UserError | None:
    """Return the error for the user where a file is not there or not allowed; None for any other error."""
    if not isinstance(error, OSError) or isinstance(error, UserError | ResourceError):
        return None
    if error.errno == errno.ENOENT:
        return MissingFileError(f"{path}: file not found")
    return UserError(f"{path}: cannot be {done} ({error.strerror})") if error.errno in REFUSED else None


def _used_up(error: Exception, path: str | Path) -> ResourceError | None:
    """Return the user's error where something is used up, which torch and safetensors say in errors of their own."""
    if isinstance(error, ResourceError | UserError):
        return None
    code = used_up(error)
    if code is not None:
        return ResourceError(f"{path}: cannot be written ({os.strerror(code)}); what was there before is unchanged")
    if isinstance(error, RuntimeError) and _CUT_SHORT.search(str(error)):
        return ResourceError(f"{path}: cannot be written (the disk is full, or a quota or limit is reached)")
    return None


def used_up(error: BaseException | None) -> int | None:
    """The number of the system's error, somewhere behind this one, that says that something is used up."""
    for one in _chain(error):
        passed_on = _RUST_ERROR.search(str(one))
        code = one.errno if isinstance(one, OSError) else int(passed_on[1]) if passed_on else None
        if code in USED_UP:
            return code
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def append(path: str | Path, text: str) -> None:
    """Add `text` to the end of a file, in one write: all of it or nothing, but for a kill within it."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            content, before = text.encode(), os.fstat(handle).st_size
            try:
                written = os.write(handle, content)
                while written < len(content):  # the disk became full within it: the next write says so
                    written += os.write(handle, content[written:])
            except OSError:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed processes left of `path`; for files that one process at a time writes."""
    path = Path(path)
    for temporary in path.parent.glob(f"{_prefix(path)}*"):
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left of any file or folder in `folder`, to which no other process writes now."""
    for temporary in Path(folder).glob(".*.tmp-*"):
        if not _LEFTOVER.fullmatch(temporary.name):  # the user's
            continue
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
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
    """Raise UserError naming the option unless files can be written to `folder`, which is not made."""
    existing = Path(os.path.abspath(folder))
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option} {folder}: {existing} is not a folder; choose another {option}")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"cannot be written to ({error.strerror}); choose another {option}"
        kind = ResourceError if used_up(error) else UserError
        raise kind(f"{option} {folder}: {reason}") from None
