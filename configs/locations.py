"""The places of the project's own files, independent of the folder in which a script was started."""

from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "data", "images", "pretrained")  # of the repository: what comes with it, and what users put there
P = TypeVar("P", str, Path)


def located(path: P) -> P:
    """The path as it is where it exists from the working folder; else, if it begins with one of `FOLDERS`, in the
    repository. Other paths, and outputs, are always relative to the working folder.
    """
    parts = Path(path).parts
    if not parts or parts[0] not in FOLDERS or Path.cwd() == ROOT:
        return path
    there = Path(path).parent if set("{*") & set(str(path)) else Path(path)  # a pattern of shards
    return path if there.exists() else type(path)(ROOT / path)
