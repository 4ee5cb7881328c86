"""Folders of images by class: in which order classes are counted, and what in a folder is neither class nor image."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")  # as archives and file servers leave it


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key: digits by their value (2 before 10) and letters whatever their case, as timm counts class folders."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits in turns, so that like is compared with like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes as their labels 0, 1, ... count them."""
    return sorted(names, key=natural_key)


def visible(name: str) -> bool:
    """Whether a file or folder of this name is the user's: hidden ones are a notebook's (.ipynb_checkpoints) or a Mac's
    (._1.png beside 1.png).
    """
    return not name.startswith(".") and name not in LITTER


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones apart, in the order of their labels."""
    return in_order(entry.name for entry in os.scandir(folder) if entry.is_dir() and visible(entry.name))


def image_files(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Names of the images (or of the files with other extensions) directly in a folder, hidden files apart."""
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(extensions) and visible(name))


def images_below(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Paths of the images (or of the files with other extensions) in a folder and in those in it, hidden files and
    folders apart, relative to it.
    """
    found = []
    for root, folders, _ in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if visible(name)]
        here = Path(root).relative_to(folder)
        found += [(here / name).as_posix() for name in image_files(Path(root), extensions)]
    return sorted(found)


def is_loose(folder: Path) -> bool:
    """Return whether there are images in a folder without two folders of classes, which would be their labels."""
    return len(class_folders(folder)) < 2 and bool(images_below(folder))
