"""A folder of images or other items, with captions and classes where there are any, for models that preprocess them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from configs.decoding import Decoding
from datasets.annotations import ImageRoot, Records, get_path, get_texts, parse_json, shown
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.labelled.class_folders import EXTENSIONS, images_below, in_order
from datasets.sampler import sample_generator
from sparsity.errors import UserError, listed

CAPTIONS = "captions.json"


class ItemFolder(Dataset):
    """Items of a folder and of those in it, in the order of their paths; hidden files and folders are not looked at.

    It is indexed by a running number n = epoch * len(dataset) + index, and an item is {kind: what `read` makes of the
    file, "caption": text or None, "class": name or None}, or `Skipped` where the file cannot be read.

    Captions stand in `captions.json` of the folder, {path: text or [texts]} or a list of records {"image": path,
    "caption": text or [texts]}, or beside each item in a text file of its name, 1.txt for 1.jpg, a caption in a line;
    of several one is drawn. Classes are the names of the folders directly in this one, in natural order, where every
    item lies in one of them.

    root: as it was given. seed: of all that is drawn. Raises UserError where there is no item, or only some have
    captions.
    """

    kind: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]

    def __init__(self, root: str | Path, folder: Path, *, seed: int):
        self.folder, self.seed = folder, seed
        self.paths = paths = images_below(folder, self.extensions)
        if not paths:
            raise UserError(f"{root}: no {self.kind} in this folder; expected {', '.join(self.extensions)}")
        captions = _captions(folder, paths, self.kind)
        self.captioned = captions is not None
        classified = all("/" in path for path in paths)
        self.classes = tuple(in_order({path.partition("/")[0] for path in paths})) if classified else ()
        captioned = "with captions" if self.captioned else "without captions"
        self.told = f"{root}: {len(paths)} {self.kind}s ({listed(paths, 3)}), {captioned}"
        self.told += f", of {len(self.classes)} classes" if self.classes else ""
        self.records = Records((path, captions[path] if captions else []) for path in paths)

    def read(self, path: str) -> Any:
        """Return the content of a file, or why it is `Skipped`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        path, captions = self.records[index]
        content = self.read(path)
        if isinstance(content, Skipped):
            return content
        caption = captions[int(rng.integers(len(captions)))] if captions else None
        return {self.kind: content, "caption": caption, "class": path.partition("/")[0] if self.classes else None}


class ImageFolder(ItemFolder):
    """RGB images of a folder, see `ItemFolder`.

    decoding: how image files become pictures. Raises FileNotFoundError where the folder is missing.
    """

    kind, extensions = "image", EXTENSIONS

    def __init__(self, root: str | Path, *, seed: int, decoding: Decoding = DEFAULT):
        self.root = ImageRoot(root, decoding)
        super().__init__(root, self.root.root, seed=seed)

    def read(self, path: str) -> Any:
        return self.root.load(path)


def _captions(folder: Path, paths: Sequence[str], kind: str) -> dict[str, list[str]] | None:
    """Path -> its captions; None where no item has any."""
    listed = folder / CAPTIONS
    found = _read_listed(listed) if listed.is_file() else {path: captions_beside(folder / path) for path in paths}
    without = [path for path in paths if not found.get(path)]
    if len(without) == len(paths) and not listed.is_file():
        return None
    if without:
        raise UserError(f"{folder}: {len(without)} of {len(paths)} {kind}s have no caption, for example {without[0]}")
    return found


def _read_listed(path: Path) -> dict[str, list[str]]:
    """Return path -> captions of a mapping, or of a list of records."""
    try:
        content = parse_json(path.read_bytes())
        if isinstance(content, dict):
            return {image: get_texts(content, image) for image in content}
        found: dict[str, list[str]] = {}
        for record in content if isinstance(content, list) else [content]:
            if not isinstance(record, dict):
                raise UserError(f"it holds {shown(record)}")
            found.setdefault(get_path(record), []).extend(get_texts(record, "caption"))
        return found
    except ValueError as error:
        how = '{image: caption or [captions]}, or a list of {"image": path, "caption": caption or [captions]}'
        raise UserError(f"{path}: expected JSON, {how}: {error}") from None


def captions_beside(image: Path) -> list[str]:
    path = image.with_suffix(".txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]


class Gather:
    """Items of an `ItemFolder` to {"batch": a batch as the model takes it}, with the samples that were skipped under
    "skipped", as `SkippedImages.watch` expects them.

    preprocess: (contents, captions or None, labels or None) -> batch; its `labels` gives classes their numbers or None,
    its `check` refuses images without captions. unlabelled: why the classes have no labels, where they should; batches
    have none then, which is an error for those alone who need a loss.
    """

    def __init__(self, data: ItemFolder, preprocess: Callable[..., Any]):
        self.preprocess, self.captioned, self.kind = preprocess, data.captioned, data.kind
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
            gathered["batch"] = self.preprocess([item[self.kind] for item in read], captions, labels)
        return gathered
