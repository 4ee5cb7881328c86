"""A folder of images, with captions and classes where there are any, for models that preprocess images themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from configs.decoding import Decoding
from datasets.annotations import ImageRoot, Records, get_texts, parse_json
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.labelled.class_folders import EXTENSIONS, images_below, in_order
from datasets.sampler import sample_generator
from sparsity.errors import UserError, listed

CAPTIONS = "captions.json"


class ImageFolder(Dataset):
    """Images of a folder and of those in it, in the order of their paths; hidden files and folders are not looked at.

    It is indexed by a running number n = epoch * len(dataset) + index, and an item is {"image": RGB image, "caption":
    text or None, "class": name or None}, or `Skipped` where the image cannot be read.

    Captions stand in `captions.json` of the folder, {path: text or [texts]}, or beside each image in a text file of
    its name, 1.txt for 1.jpg, a caption in a line; of several one is drawn. Classes are the names of the folders
    directly in this one, in natural order, where every image lies in one of them.

    Args:
        seed: of all that is drawn.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: the folder is missing.
        UserError: there is no image in it, or only some have captions.
    """

    def __init__(self, root: str | Path, *, seed: int, decoding: Decoding = DEFAULT):
        self.root, self.seed = ImageRoot(root, decoding), seed
        folder = self.root.root
        paths = images_below(folder)
        if not paths:
            raise UserError(f"{root}: no image in this folder; expected {', '.join(EXTENSIONS)}")
        captions = _captions(folder, paths)
        self.captioned = captions is not None
        classified = all("/" in path for path in paths)
        self.classes = tuple(in_order({path.partition("/")[0] for path in paths})) if classified else ()
        self.paths = paths
        captioned = "with captions" if self.captioned else "without captions"
        self.told = f"{root}: {len(paths)} images ({listed(paths, 3)}), {captioned}"
        self.told += f", of {len(self.classes)} classes" if self.classes else ""
        self.records = Records((path, captions[path] if captions else []) for path in paths)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        path, captions = self.records[index]
        image = self.root.load(path)
        if isinstance(image, Skipped):
            return image
        caption = captions[int(rng.integers(len(captions)))] if captions else None
        return {"image": image, "caption": caption, "class": path.partition("/")[0] if self.classes else None}


def _captions(folder: Path, paths: Sequence[str]) -> dict[str, list[str]] | None:
    """Path -> its captions; None where no image has any."""
    listed = folder / CAPTIONS
    found = _read_listed(listed) if listed.is_file() else {path: captions_beside(folder / path) for path in paths}
    without = [path for path in paths if not found.get(path)]
    if len(without) == len(paths) and not listed.is_file():
        return None
    if without:
        raise UserError(f"{folder}: {len(without)} of {len(paths)} images have no caption, for example {without[0]}")
    return found


def _read_listed(path: Path) -> dict[str, list[str]]:
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise UserError(f"it holds a {type(content).__name__}")
        return {image: get_texts(content, image) for image in content}
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, {{image path: caption or [captions]}}: {error}") from None


def captions_beside(image: Path) -> list[str]:
    path = image.with_suffix(".txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]


class Gather:
    """Items of an `ImageFolder` to {"batch": a batch as the model takes it}, with the samples that were skipped under
    "skipped", as `SkippedImages.watch` expects them.

    preprocess: (images, captions or None, labels or None) -> batch; its `labels` gives classes their numbers or None,
    its `check` refuses images without captions. unlabelled: why the classes have no labels, where they should; batches
    have none then, which is an error for those alone who need a loss.
    """

    def __init__(self, data: ImageFolder, preprocess: Callable[..., Any]):
        self.preprocess, self.captioned = preprocess, data.captioned
        preprocess.check(data.captioned)
        self.unlabelled: UserError | None = None
        labels = None
        try:
            labels = preprocess.labels(data.classes) if data.classes else None
        except UserError as error:
            self.unlabelled = error
        self.labels = dict(zip(data.classes, labels, strict=True)) if labels else None

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        read = [item for item in items if not isinstance(item, Skipped)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        gathered: dict[str, Any] = {"skipped": skipped} if skipped else {}
        if read:
            captions = [item["caption"] for item in read] if self.captioned else None
            labels = [self.labels[item["class"]] for item in read] if self.labels else None
            gathered["batch"] = self.preprocess([item["image"] for item in read], captions, labels)
        return gathered
