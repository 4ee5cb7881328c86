"""WebDataset shards as img2dataset writes them: whether they are whole, and the samples inside.

A shard is a tar file with `KEY.jpg`, `KEY.txt` (the caption) and `KEY.json` for each sample, and has `NNNNN_stats.json`
beside it. Nothing is ever unpacked to the disk.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from configs.shard_names import HOW_TO_GET
from datasets.annotations import check_text, get_text, parse_json
from sparsity.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512  # a tar file is made of blocks of so many bytes, the last two of them zero
_MAGIC = slice(257, 262)


class Sample(NamedTuple):
    """name: `SHARD/KEY.jpg`. image: the encoded bytes. Image and caption are None where the shard has none; fault: what
    is wrong with the caption then.
    """

    name: str
    image: bytes | None
    caption: str | None
    fault: str = ""


def check_shard(path: Path) -> None:
    """Raise UserError unless the file is a tar file with an end: one that was cut off has none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_BLOCK)
        file.seek(max(0, size - 2 * _BLOCK))
        end = file.read()
    if any(head) and head[_MAGIC] != b"ustar":
        raise UserError(f"{path}: not an uncompressed tar file; {HOW_TO_GET}")
    if size < 2 * _BLOCK or size % _BLOCK or any(end):
        raise UserError(f"{path}: the end of this tar file is missing; remove it and get it again: {HOW_TO_GET}")


def open_shard(path: Path) -> int:
    """Samples in a shard (see `count_samples`).

    Raises:
        UserError: it is cut off, or its first sample has no image or no caption.
    """
    check_shard(path)
    count = count_samples(path)
    first = next(read_shard(path), None) if count else None
    if count and first is None:
        raise UserError(miscounted(path, count))
    if first and first.image is None:
        raise UserError(f"{first.name}: no image (.jpg, .png or .webp) for this key in the shard; {HOW_TO_GET}")
    if first and first.caption is None:
        raise UserError(f"{first.name}: {first.fault}; {HOW_TO_GET}")
    return count


def miscounted(path: Path, count: int) -> str:
    """Return the message for a shard with other than `count` samples."""
    return f"{path}: does not hold the {count} samples of {stats_path(path)}; get both again, or remove the latter"


def count_samples(path: Path) -> int:
    """Samples in a shard: what img2dataset's `NNNNN_stats.json` says, or else by a walk through the tar file.

    Raises:
        UserError: neither can be read, or the tar file has a path that leads out of it.
    """
    stats = stats_path(path)
    if stats.is_file():
        try:
            count = parse_json(stats.read_bytes())["successes"]
        except (ValueError, KeyError, TypeError):
            count = None
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(f"{stats}: expected img2dataset's JSON with 'successes'; correct or remove it")
        return count
    return sum(1 for _ in _keys(path))


def stats_path(path: Path) -> Path:
    """Return the file into which img2dataset writes the counts of a shard."""
    return path.with_name(f"{path.stem}_stats.json")


def _keys(path: Path) -> Iterator[str]:
    """The key of every sample, as webdataset groups files: neighbours whose names are the same up to a dot."""
    last = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_inside(path, member.name)
                key = base_plus_ext(member.name)[0] if member.isreg() else None
                if key not in (None, last):
                    last = key
                    yield key
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(_BLOCK)):  # tarfile stops at a header that it cannot read as if it were the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(_damaged(path, error)) from None


def read_shard(path: Path) -> Iterator[Sample]:
    """The samples of a shard in their order, read as a stream by webdataset.

    Raises:
        UserError: the tar file is damaged, or has a path that leads out of it.
    """
    with path.open("rb") as stream:
        groups = group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        while True:
            try:
                group = next(groups, None)
            except (tarfile.TarError, EOFError, OSError, ValueError) as error:
                raise UserError(_damaged(path, error)) from None
            if group is None:
                return
            _check_inside(path, group["__key__"])
            yield _sample(path, group)


def _sample(path: Path, group: dict[str, Any]) -> Sample:
    kind = next((kind for kind in IMAGES if kind in group), None)
    name = f"{path}/{group['__key__']}" + (f".{kind}" if kind else "")
    try:
        caption, fault = check_text(caption_of(group), "caption").strip(), ""
    except ValueError as error:
        caption, fault = None, str(error)
    return Sample(name, group[kind] if kind else None, caption, fault)


def caption_of(group: dict[str, Any]) -> str:
    if "txt" in group:
        try:
            return group["txt"].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"its caption (.txt) is not UTF-8 ({error})") from None
    content = {}
    if "json" in group:
        try:
            content = parse_json(group["json"])
        except ValueError as error:
            raise UserError(f"its .json is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("caption") is None:
        raise UserError("no caption (.txt, or 'caption' in .json) for this key in the shard")
    return get_text(content, "caption", blank=True)


def _check_inside(path: Path, name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise UserError(f"{path}: has a file {name!r}, which leads out of the archive; don't use this shard")


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    return f"{path}: damaged tar file ({reason:.200}); remove it and get it again: {HOW_TO_GET}"
