"""Which shards a name in a configuration stands for. Needs no torch, so that it is checked at once."""

import glob
import math
import os
import re
from pathlib import Path

# The package's stub leaves the error out.
from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

from sparsity.errors import MissingFileError, UserError

HOW_TO_GET = "img2dataset --output_format webdataset writes such shards, see docs/datasets.md"
_MOST = 100_000  # names that one pattern stands for
_LONGEST = 18  # digits of a number in it
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_TOKENS = re.compile(r"\{-?\d+\.\.-?\d+(?:\.\.-?\d+)?\}|[{},]")


def is_pattern(images: str) -> bool:
    """Whether the name stands for shards, not for a folder."""
    return images.endswith(".tar") or "{" in images or glob.has_magic(images)


def shard_names(images: str) -> list[str]:
    """Return the shards of a name: a shard, braces such as `images/cc3m/{00000..00331}.tar`, a glob, or a folder's.

    Braces name shards whether they are there or not; globs and folders give those that are there, sorted.

    Raises:
        UserError: unbalanced braces, more than _MOST names, something that is no .tar, or a shard named twice.
    """
    if os.path.isdir(images):
        return sorted(glob.glob(f"{glob.escape(images)}/*.tar"))
    if _count(images) > _MOST:
        raise UserError(f"{_line(images)}: its braces stand for more than {_MOST:,} names")
    try:
        patterns = list(braceexpand(images, escape=False))
        names = [n for pattern in patterns for n in (sorted(glob.glob(pattern)) if _magic(pattern) else [pattern])]
    except UnbalancedBracesError:
        raise UserError(f"{_line(images)}: unbalanced braces; expected e.g. images/cc3m/{{00000..00331}}.tar") from None
    except (ValueError, RecursionError) as error:  # a zero byte; braces in braces in braces
        raise UserError(f"{_line(images)}: no names of shards can be made of it ({error})") from None
    last = None
    for name in sorted(names):
        if not name.endswith(".tar"):
            raise UserError(f"{_line(name)}: expected .tar files (of {_line(images)}); {HOW_TO_GET}")
        if name == last:
            raise UserError(f"{_line(name)}: named twice by {_line(images)}")
        last = name
    return names


def _count(pattern: str) -> int:
    """How many names braces stand for, as `braceexpand` makes them, which holds some of them at once."""
    counts = [[0, 1]]  # for each open brace: names of the alternatives before the last comma, and after it
    for token in _TOKENS.findall(pattern):
        if token == "{":
            counts.append([0, 1])
        elif token == "," and len(counts) > 1:
            counts[-1] = [sum(counts[-1]), 1]
        elif token == "}" and len(counts) > 1:
            inside = sum(counts.pop())
            counts[-1][1] *= inside
        elif found := _RANGE.fullmatch(token):
            counts[-1][1] *= _in_range(*found.groups())
    return math.prod(map(sum, counts))


def _in_range(first: str, last: str, step: str | None) -> int:
    if max(map(len, (first, last, step or ""))) > _LONGEST:
        return _MOST + 1
    return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1


def _line(name: str) -> str:
    return " ".join(name.split())[:500]


def _magic(pattern: str) -> bool:
    return glob.has_magic(pattern) and not os.path.isfile(pattern)


def shard_paths(images: str) -> list[Path]:
    """The shards of `shard_names`, at least one; raises FileNotFoundError, naming one that is missing."""
    paths = [Path(name) for name in shard_names(images)]
    if not paths:
        raise MissingFileError(f"{images}: no shard (.tar) found; {HOW_TO_GET}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        others = f", nor {len(missing) - 1} more of the {len(paths)} of {images}" if len(missing) > 1 else ""
        raise MissingFileError(f"{missing[0]}: shard not found{others}; {HOW_TO_GET}")
    return paths
