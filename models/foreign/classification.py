"""Image classification by any model of timm or transformers: cross-entropy of its logits.

The classes are those of the data. A head whose classes have the same names is kept, its rows in the order of the data;
any other is a new one: labels are never told by their position alone, unless that is asked for. Data without labels
leaves the head of the weights as it is.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights, read_weights
from models.external import model as external
from models.external import timm_classifier
from models.external.labels import (
    Classes,
    classes_beside,
    classes_of_timm,
    classes_of_transformers,
    names_beside,
    save_classes,
)
from models.external.libraries import library_of, seeded
from models.foreign.images import Preparation, of_timm, of_transformers
from models.foreign.task_model import NEW as NEW
from models.foreign.task_model import ForeignTaskModel
from models.foreign.task_model import prunable_view as prunable_view
from models.foreign.task_model import save as save
from models.foreign.task_model import task_names as task_names
from models.hub import first_line, local_only
from sparsity.errors import UserError
from sparsity.files import SAVED, writing
from sparsity.view import Output, Outputs

log = logging.getLogger(__name__)
Loss = Callable[[Tensor, dict[str, Any]], Tensor]  # of logits (B, classes) and a batch


class Asked(Protocol):
    """The part of a configuration that is read here, see `configs.foreign.ForeignClassificationConfig`."""

    weights: str
    weights_key: str
    image_res: int | None
    keep_head: bool
    model_kwargs: Mapping[str, Any]

    @property
    def checkpoint(self) -> str | None: ...


class Classifier(ForeignTaskModel):
    """A model of timm or transformers on labelled images. class_names: of its logits, in their order; () where they
    have none.
    """

    loss: Loss
    preparation: Preparation
    class_names: Sequence[str]

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """The loss of `batch` = {"image": (B, 3, H, W), "label": (B,), or (B, classes) where images are mixed}."""
        return {"loss": self.loss(self.classify(batch["image"]), batch)}

    def taught(
        self, batch: dict[str, Any], epoch: float, outputs: Callable[[dict[str, Any]], Outputs]
    ) -> tuple[dict[str, Tensor], Outputs]:
        logits = self.classify(batch["image"])
        return {"loss": self.loss(logits, batch)}, {"logits": Output("logits", logits)}

    def classify(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def save_classes(self, folder: Path) -> None:
        if self.class_names:
            save_classes(self.class_names, folder)


class TimmClassifier(Classifier):
    def __init__(self, model: nn.Module, source: str, class_names: Sequence[str], fresh: Sequence[str]):
        super().__init__(model, source, fresh)
        self.class_names = class_names
        self.preparation = of_timm(model, None)

    def classify(self, image: Tensor) -> Tensor:
        return self.model(image)

    def library_batch(self, batch: dict[str, Any]) -> Any:
        return tuple(batch[name] for name in ("image", "label") if name in batch)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and config.json, which timm reads as local-dir:FOLDER, and the classes."""
        from timm.models import save_for_hf

        with writing(folder):
            save_for_hf(self.model, str(folder), safe_serialization=True)
        self.save_classes(folder)


class TransformersClassifier(Classifier):
    def __init__(self, model: nn.Module, source: str, class_names: Sequence[str], fresh: Sequence[str], processor: Any):
        super().__init__(model, source, fresh)
        self.class_names, self.processor = class_names, processor
        self.preparation = of_transformers(source.removeprefix("hf:"), processor)

    def classify(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image).logits

    def library_batch(self, batch: dict[str, Any]) -> Any:
        labels = {"labels": batch["label"]} if "label" in batch and batch["label"].ndim == 1 else {}  # not mixed
        return {"pixel_values": batch["image"], **labels}

    def save(self, folder: Path) -> None:
        """Write the folder of save_pretrained, with the image processor, and the classes."""
        with writing(folder):
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        self.save_classes(folder)


def build(
    name: str, config: Asked, class_names: Sequence[str], *, loss: Loss, seed: int, drop_path: float | None = None
) -> Classifier:
    """Return the classifier of these classes that --model names, in float32. class_names: () where the data has no
    labels: the classes are those of the weights.

    A new head is drawn from the seed. drop_path: a rate, of timm alone. Raises UserError for a model or weights that
    are not to be had, and for a model that is no classifier of images.
    """
    library, _, own = name.partition(":")
    with seeded(seed, torch.zeros(())):
        if library == "timm":
            model = _of_timm(own, config, class_names, drop_path)
        elif drop_path is not None or config.image_res is not None or config.model_kwargs:
            told = "image_res, drop_path and model_kwargs"
            raise UserError(f"{told} of a configuration are for models of timm: leave them out with {name}")
        else:
            model = _of_transformers(own, config, class_names)
    model.loss, model.untaught = loss, ("logits",) if model.fresh else ()
    return model


def _of_timm(name: str, config: Asked, class_names: Sequence[str], drop_path: float | None) -> TimmClassifier:
    path = Path(config.checkpoint) if config.checkpoint else None
    names = class_names or (names_beside(path) if path else ())
    published = path is None and config.weights != external.RANDOM
    options = {**config.model_kwargs, **({} if published or not names else {"num_classes": len(names)})}
    options |= {} if drop_path is None else {"drop_path_rate": drop_path}
    model = external.timm_model(name, published, option="--model timm:", image_size=config.image_res, **options)
    model = model.float()
    known = classes_of_timm(model) if published else classes_beside(path) if path else None
    order = _order(known, class_names, config, model.num_classes)
    if published and order is None:
        model.reset_classifier(len(names))
    if path is not None:
        weights = timm_classifier.read(path, key=config.weights_key)
        ignored = [] if order else _head_globs(model)
        load_weights(model, path, positions=timm_classifier.POSITIONS, ignored=ignored, weights=weights)
    if names:
        labels = {"num_classes": len(names), "label_names": list(names), "label_descriptions": None}
        model.pretrained_cfg = {**model.pretrained_cfg, **labels}
    else:
        names = _distinct(model.pretrained_cfg.get("label_names") or (), model.num_classes)
    return TimmClassifier(model, f"timm:{name}", names, _set_head(model, order))


def _of_transformers(name: str, config: Asked, class_names: Sequence[str]) -> TransformersClassifier:
    import transformers

    path = Path(config.checkpoint) if config.checkpoint else None
    if path is not None and path.name in SAVED and (path.parent / "config.json").is_file():
        path = path.parent  # names in a file that transformers wrote are not those of the modules
    folder = path if path is not None and path.is_dir() and not config.weights_key else None
    where, kind = str(folder or name), transformers.AutoModelForImageClassification
    settings, processor = _settings(transformers, name)
    names = class_names or (names_beside(path) if path else ())
    published = folder is not None or (path is None and config.weights != external.RANDOM)
    has_head = published and any("ForImageClassification" in kind for kind in settings.architectures or ())
    known = classes_beside(path) if path else classes_of_transformers(settings) if has_head else None
    there = has_head or path is not None
    order = _order(known, class_names, config, len(names) if path and names else settings.num_labels, there)
    if names and (order is None or path is not None):
        settings.id2label = dict(enumerate(names))
    if published:
        how = {"config": settings, "dtype": torch.float32, "ignore_mismatched_sizes": order is None}
        try:
            model = kind.from_pretrained(where, local_files_only=local_only(where), **how)
        except Exception as error:
            raise UserError(f"--model hf:{name}: no weights: {first_line(error)}; {external.OTHER_WEIGHTS}") from error
        model.name_or_path = name
    else:
        model = kind.from_config(settings).float()
    if path is not None and folder is None:
        weights = read_weights(path, key=config.weights_key)
        load_weights(model, path, ignored=[] if order else _head_globs(model), weights=weights)
    fresh = _set_head(model, order)
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: number for number, label in enumerate(names)}
    else:
        names = _distinct(settings.id2label.values(), settings.num_labels)
    return TransformersClassifier(model.eval(), f"hf:{name}", names, fresh, processor)


def _distinct(names: Iterable[str], count: int) -> tuple[str, ...]:
    """Return the names of so many classes; () unless there is one of its own for each."""
    found = tuple(names)
    return found if len(found) == len(set(found)) == count else ()


def _settings(transformers: Any, name: str) -> tuple[Any, Any]:
    """Return the configuration of a model of transformers and its image processor; UserError without either."""
    local = {"local_files_only": local_only(name), "trust_remote_code": False}
    try:
        settings = transformers.AutoConfig.from_pretrained(name, **local)
        if type(settings) not in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise ValueError(f"transformers has no image classifier of the kind {settings.model_type!r}")
        return settings, transformers.AutoImageProcessor.from_pretrained(name, **local)
    except Exception as error:  # of the network, of the hub, of files: each its own kind
        way_out = "give a folder that save_pretrained wrote, with its image processor, or the name of one on the hub"
        raise UserError(f"--model hf:{name}: {first_line(error)}; {way_out}") from error


def _order(
    known: Classes | None, class_names: Sequence[str], config: Asked, count: int, there: bool = True
) -> list[int] | None:
    """Return the row of the head of the weights that each class has; None where the head is to be a new one.

    known: the classes of the weights, where they have names. class_names: () where those are as good as any. count: of
    the rows. there: whether the weights have a head at all.
    """
    if not class_names:
        if config.keep_head:
            raise UserError("--keep_head is for class folders: without them the head is kept, leave it out")
        if not count:
            raise UserError(f"--distill 1: {config.weights} weights have no classes, and images have no labels")
        return list(range(count)) if there and config.weights != external.RANDOM else None
    wanted = f"{len(class_names)} classes of the data"
    if config.keep_head:
        if count != len(class_names):
            raise UserError(f"--keep_head: the head of {config.weights} has {count} classes, and there are {wanted}")
        return list(range(count))
    order = known.order(class_names) if known else None
    if order is not None:
        log.info("the head is kept: its classes are the %s, by name", wanted)
    elif known is None:
        log.info("the head is new, for the %s: that of the weights has no names of classes, or is not there", wanted)
    elif known.count != len(class_names):
        log.info("the head is new, for the %s: that of the weights has %d", wanted, known.count)
    else:
        log.info("the head is new, for the %s: those of the weights have other names", wanted)
    return order


def _head_globs(model: nn.Module) -> list[str]:
    return [f"{head}.*" for head in library_of(model).heads()]


@torch.no_grad()
def _set_head(model: nn.Module, order: Sequence[int] | None) -> list[str]:
    """Put the rows of a head in order, or draw a new one; returns the names of its parameters where it is new.

    UserError where the model has no head with a row for each class.
    """
    heads = {name for name in library_of(model).heads() if name}
    rows = {name: p for name, p in model.named_parameters() if any(name.startswith(f"{head}.") for head in heads)}
    if order is not None:
        for parameter in rows.values():
            if len(parameter) == len(order):
                parameter.copy_(parameter[list(order)].clone())
        return []
    modules = [module for head in heads for module in model.get_submodule(head).modules()]
    linear = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    if not linear:
        raise UserError(f"{type(model).__name__}: no layer is known as its head: it cannot be given other classes")
    for module in linear:
        module.reset_parameters()
    return list(rows)
