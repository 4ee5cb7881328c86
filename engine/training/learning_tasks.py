"""Tasks that masks are learned on: the batches, the loss and the evaluation of a model."""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages, collate
from datasets.labelled.data_path import BUNDLED
from datasets.labelled.public import check_classes
from datasets.labelled.timm_images import open_images
from datasets.loaders import loader
from engine.contents import classes, contents
from engine.evaluation.classification import Accuracy, Classifier
from engine.options.command_line import decoding
from engine.pruning.data_kinds import Subject
from engine.ranks import on_leader, place_of
from engine.training.timm_training import Labelled
from sparsity.errors import UserError
from sparsity.statistics.gradients import batch_generator
from sparsity.view import PrunableView

Metrics = dict[str, float]


class Task(Protocol):
    """A task that masks are learned on: a model, its data and its loss.

    epoch_steps: batches of this rank in an epoch. select: the metric of `evaluate` that says which masks are the best;
    None where there is no evaluation. contents: what the data holds, as far as it is told by looking at it.
    """

    contents: dict[str, Any]
    view: PrunableView
    epoch_steps: int
    select: str | None

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """The batches of this rank in the steps from `start` to `stop`."""

    def loss(self, batch: Any, step: int) -> Tensor: ...

    def evaluate(self) -> Metrics:
        """Return the metrics of the model as it is, by which the best masks are chosen."""

    def test(self) -> Metrics:
        """Return the metrics of the model as it is, at the end."""


class ImageTask:
    """A classifier of timm on labelled images.

    model: on the device of `fabric`. settings: of timm's data, `input_size`, `mean`, `std`, `crop_pct` and
    `interpolation`. Raises OSError or UserError where the data is not there, or has other classes than the model.
    """

    select = "top1"

    def __init__(self, args: Namespace, fabric: Any, model: nn.Module, view: PrunableView, settings: dict[str, Any]):
        self.args, self.fabric, self.model, self.view = args, fabric, model, view
        self.compiled = torch.compile(model) if args.torchcompile else model
        side = settings["input_size"][-1]
        trained = {"auto_augment": args.aa, "re_prob": args.reprob, "re_mode": args.remode, "hflip": args.hflip}
        trained |= {"color_jitter": args.color_jitter, "scale": args.scale, "ratio": args.ratio}
        opened = partial(open_images, args.data_path, side=side, decoding=decoding(args))
        lengths = {"train": args.train_images, "val": args.val_images, "test": args.test_images}
        self.train = opened("train", length=lengths["train"], augment=settings | trained, seed=args.seed)
        names = ("val", "test") if args.data_path == BUNDLED else ("val",)
        sets = {name: opened(name, length=lengths[name], augment=settings, seed=0) for name in names}
        check_classes(len(self.train.class_names), model.num_classes)
        self.contents = {
            name: classes(data.class_names, len(data)) for name, data in {"train": self.train, **sets}.items()
        }
        self.labelled = Labelled(args, model.num_classes)
        self.epoch_steps = len(self.train) // (args.batch_size * fabric.world_size)
        if not self.epoch_steps:
            raise UserError(f"--batch-size {args.batch_size}: the training set has {len(self.train)} images")
        self.accuracies = {name: self._accuracy(data, lengths[name]) for name, data in sets.items()}

    def _accuracy(self, data: Any, length: int | None) -> Accuracy:
        part = Subset(data, range(min(length or len(data), len(data))))
        reading = {"workers": self.args.workers, "max_skipped": self.args.max_skipped}
        return Accuracy(Classifier(self.model), part, self.fabric, self.args.folder, **reading)

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        place = place_of(self.fabric)
        order = {"seed": self.args.seed, "start": start, "stop": stop, "workers": self.args.workers}
        read = loader(self.train, self.args.batch_size, collate, place=place, **order)
        path = skipped_path(self.args.folder, self.fabric.global_rank)
        skipped = SkippedImages(path, (stop - start) * self.args.batch_size, self.args.max_skipped)
        for step, batch in enumerate(skipped.watch(read), start):
            yield self.labelled.prepared(batch, place.batch(step))

    def loss(self, batch: Any, step: int) -> Tensor:
        return self.labelled.loss(self.compiled(batch["image"]), batch)

    def evaluate(self) -> Metrics:
        return self.accuracies["val"]()

    def test(self) -> Metrics:
        return self.accuracies["test"]() if "test" in self.accuracies else {}


class SubjectTask:
    """A model of prune.py with its calibration batches, its own loss, and its evaluation where it has one.

    num_batches: of an epoch, on all ranks. config: of the subject, a dataclass.
    """

    def __init__(
        self, args: Namespace, fabric: Any, subject: Subject, view: PrunableView, num_batches: int, config: Any
    ):
        self.contents = fabric.broadcast(on_leader(fabric, partial(contents, config)))
        self.subject, self.view, self.seed, self.fabric = subject, view, args.seed, fabric
        self.data = subject.calibration(args.folder, num_batches, args.seed)
        self.epoch_steps = len(self.data.numbers) if fabric.world_size == 1 else self.data.batches // fabric.world_size
        self.evaluation = subject.evaluation(args.folder) if args.evaluate else None
        self.metric = next(iter(subject.metrics.values()), None) if args.evaluate else None
        self.select = self.metric

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """An epoch that is entered in the middle is read from its beginning."""
        step = start
        while step < stop:
            epoch, skip = divmod(step, self.epoch_steps)
            count = min(self.epoch_steps - skip, stop - step)
            yield from islice(self.data.at(epoch), skip, skip + count)
            step += count

    def loss(self, batch: Any, step: int) -> Tensor:
        number = place_of(self.fabric).batch(step)
        return self.view.loss(batch, batch_generator(self.seed, number))

    def evaluate(self) -> Metrics:
        return dict(self.evaluation())

    def test(self) -> Metrics:
        return {}
