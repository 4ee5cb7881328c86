"""Which shards a name in a configuration stands for. Needs no torch, so that it is checked at once."""

import glob
from pathlib import Path

# The package's stub leaves the error out.
from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

from sparsity.errors import MissingFileError, UserError

HOW_TO_GET = "img2dataset --output_format webdataset writes such shards, see README.md"


def is_pattern(images: str) -> bool:
    """Whether the name stands for shards, not for a folder."""
    return images.endswith(".tar") or "{" in images or glob.has_magic(images)


def shard_names(images: str) -> list[str]:
    """What a name stands for: a shard, braces such as `images/cc3m/{00000..00331}.tar`, a glob, or a folder's shards.

    Braces name shards whether they are there or not; globs and folders give those that are there, sorted.

    Raises:
        UserError: unbalanced braces, something that is no .tar, or a shard named twice.
    """
    if Path(images).is_dir():
        return sorted(glob.glob(f"{glob.escape(images)}/*.tar"))
    try:
        patterns = list(braceexpand(images, escape=False))
    except UnbalancedBracesError:
        raise UserError(f"{images}: unbalanced braces; expected e.g. images/cc3m/{{00000..00331}}.tar") from None
    names = [name for pattern in patterns for name in (sorted(glob.glob(pattern)) if _magic(pattern) else [pattern])]
    for i, name in enumerate(sorted(names)):
        if not name.endswith(".tar"):
            raise UserError(f"{name}: expected .tar files (of {images}); {HOW_TO_GET}")
        if i and name == sorted(names)[i - 1]:
            raise UserError(f"{name}: named twice by {images}")
    return names


def _magic(pattern: str) -> bool:
    return glob.has_magic(pattern) and not Path(pattern).is_file()


def shard_paths(images: str) -> list[Path]:
    """The shards of `shard_names`, at least one; raises FileNotFoundError, naming one that is missing."""
    paths = [Path(name) for name in shard_names(images)]
    if not paths:
        raise MissingFileError(f"{images}: no shard (.tar) found; {HOW_TO_GET}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        others = f", nor {len(missing) - 1} more of the {len(paths)} of {images}" if len(missing) > 1 else ""
        raise MissingFileError(f"{missing[0]}: shard not found{others}; {HOW_TO_GET}")
    return paths
