"""Which classes of a model the folders of images are: by name, by ImageNet's synsets, or by a JSON file; no guesses."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

log = logging.getLogger(__name__)

SYNSET = re.compile(r"n\d{8}")  # of WordNet, as ImageNet names its folders
UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls the classes of a model that has no names for them
BACKGROUND = 1001  # classes of ImageNet with one for "none" before them
WAY_OUT = "give --class_map FILE, JSON {folder: class}, by name or number"
CLASSES = "classes.json"  # beside weights that have been fine-tuned: {class: label}
SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    count: how many there are. names: all that a class is called -> its label. own: whether the model says itself what
    its classes are; where it does not, as many folders as there are classes are counted as they stand.
    """

    count: int
    names: Mapping[str, int]
    own: bool

    def labels(self, folders: Sequence[str], given: Mapping[str, int] | None = None) -> list[int]:
        """The label of each folder. given: folder -> label, from `read_map`, which alone counts then.

        folders: in the order in which timm counts them. UserError, which lists them, where some are no class.
        """
        if given is not None:
            missing = [folder for folder in folders if folder not in given]
            if missing:
                raise UserError(f"--class_map has no class for {_listed(missing)}")
            return [given[folder] for folder in folders]
        known = _by_plain_name(self.names)
        found = [known.get(_plain(folder)) for folder in folders]
        if None not in found:
            return found
        if not self.own and set(found) == {None} and len(folders) == self.count:
            log.info("the model has no names for its classes: the %d folders are counted in their order", self.count)
            return list(range(self.count))
        unknown = [folder for folder, label in zip(folders, found, strict=True) if label is None]
        known_as = f": {_listed(self.names)}" if self.names else ", which have no names"
        raise UserError(
            f"--calibration: {len(unknown)} of {len(folders)} class folders are none of the model's {self.count}"
            f" classes: {_listed(unknown)}; the model has {self.count} classes{known_as}; {WAY_OUT}"
        )

    def order(self, names: Sequence[str]) -> list[int] | None:
        """Return the label of each name where the names are those of the classes, each once; else None."""
        known = _by_plain_name(self.names)
        found = [label for name in names if (label := known.get(_plain(name))) is not None]
        return found if len(names) == len(set(found)) == self.count else None


def read_map(path: str | Path, classes: Classes) -> dict[str, int]:
    """Folder -> label of a JSON file {folder: class}, by number or by name. UserError where it is another."""
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"--class_map {path}: there is no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class_map {path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--class_map {path}: expected {{folder: class}}, got a {type(content).__name__}")
    known = _by_plain_name(classes.names)
    labels = {
        folder: known.get(_plain(value)) if isinstance(value, str) else value for folder, value in content.items()
    }
    for folder, label in labels.items():
        if type(label) is not int or not 0 <= label < classes.count:
            told = f"is none of the model's {classes.count} classes: a number from 0, or a name"
            raise UserError(f"--class_map {path}: {content[folder]!r} of {folder!r} {told}")
    return labels


def save_classes(names: Sequence[str], folder: Path) -> None:
    """Write the labels of classes beside weights, as `read_map` reads them."""
    labels = {name: label for label, name in enumerate(names)}
    write_atomic(folder / CLASSES, (json.dumps(labels, indent=1, ensure_ascii=False) + "\n").encode())


def classes_beside(weights: Path) -> Classes | None:
    """Return the classes that `save_classes` has written into the folder of a file with weights; None without any."""
    path = (weights if weights.is_dir() else weights.parent) / CLASSES
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(labels, dict) or sorted(labels.values(), key=str) != sorted(range(len(labels)), key=str):
        raise UserError(f"{path}: expected {{class: label}} with the labels 0, 1, ..., each once")
    return Classes(len(labels), labels, True)


def names_beside(weights: Path) -> tuple[str, ...]:
    """Return the names that `save_classes` has written beside weights, in the order of their labels; () without any."""
    classes = classes_beside(weights)
    return tuple(sorted(classes.names, key=classes.names.__getitem__)) if classes else ()


def check_teacher(names: Sequence[str], teacher: Path | None) -> None:
    """Raise UserError where the classes of a teacher are known, and are others than these or in another order."""
    beside = classes_beside(teacher) if teacher else None
    if beside is not None and beside.order(names) != list(range(len(names))):
        told = f"{_listed(beside.names)}, and those of the data are {_listed(names)}"
        raise UserError(
            f"--teacher {teacher}: its classes are {told}: give one that was trained on these, in this order"
        )


def classes_of_timm(model: nn.Module) -> Classes:
    """Those of ImageNet where timm says so, or those that come with the weights."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = list(model.pretrained_cfg.get("label_names") or ())
    if len(names) == model.num_classes:
        descriptions = model.pretrained_cfg.get("label_descriptions") or {}
        described = [descriptions.get(name, "") for name in names] if isinstance(descriptions, Mapping) else names
        return Classes(len(names), _unique([[n, *_synonyms(d)] for n, d in zip(names, described, strict=True)]), True)
    subset = infer_imagenet_subset(model)
    return Classes(model.num_classes, _imagenet(ImageNetInfo(subset)) if subset else {}, False)


def classes_of_transformers(config: Any) -> Classes:
    """The names in a configuration, and the synsets where they are ImageNet's."""
    labels = {int(label): str(name) for label, name in config.id2label.items()}
    count = config.num_labels
    unnamed = all(UNNAMED.fullmatch(name) for name in labels.values())
    names = _unique([[labels.get(label, ""), *_synonyms(labels.get(label, ""))] for label in range(count)])
    return Classes(count, names | _synsets(labels, count, unnamed), not unnamed)


def _synsets(labels: Mapping[int, str], count: int, unnamed: bool) -> dict[str, int]:
    """ImageNet's synsets -> their labels, where the names are its own (nine in ten of them), or there are none."""
    if count not in (BACKGROUND - 1, BACKGROUND):
        return {}
    from timm.data import ImageNetInfo

    info, first = ImageNetInfo(), int(count == BACKGROUND)
    described = [_plain(info.index_to_description(i)).split(",")[0] for i in range(info.num_classes())]
    same = sum(_plain(labels.get(first + i, "")).split(",")[0] == name for i, name in enumerate(described))
    if not unnamed and same < 0.9 * len(described):
        return {}
    return {info.index_to_label_name(i): first + i for i in range(info.num_classes())}


def _imagenet(info: Any) -> dict[str, int]:
    """Synsets and words of one of ImageNet's subsets -> labels."""
    indices = range(info.num_classes())
    return _unique([[info.index_to_label_name(i), *_synonyms(info.index_to_description(i))] for i in indices])


def _synonyms(name: str) -> list[str]:
    """ "tench, Tinca tinca": the whole, and each of its words."""
    return [name, *(part for part in name.split(", ") if part != name)]


def _unique(names: Sequence[Sequence[str]]) -> dict[str, int]:
    """Every name of each class -> its label, but for those that several classes have (two of ImageNet's are cranes)."""
    found: dict[str, int] = {}
    twice = set()
    for label, each in enumerate(names):
        for name in filter(None, each):
            if found.setdefault(name, label) != label:
                twice.add(name)
    return {name: label for name, label in found.items() if name not in twice}


def _by_plain_name(names: Mapping[str, int]) -> dict[str, int | None]:
    """Names as they are compared -> labels; None where case or underscores alone tell classes apart."""
    found: dict[str, int | None] = {}
    for name, label in names.items():
        plain = _plain(name)
        found[plain] = label if found.get(plain, label) == label else None
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _listed(names: Sequence[str] | Mapping[str, int]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:SHOWN])) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)
