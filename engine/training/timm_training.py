"""Training as timm does it, by its own factories: optimizer, learning rate, mixup and loss."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.labelled.timm_images import drawing
from datasets.loaders import loader
from datasets.place import Place
from datasets.sampler import sample_generator
from sparsity.errors import UserError

Gather = Callable[[list[Any]], dict[str, Any]]


def build_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """timm's optimizer of what learns. UserError where there is none of this name."""
    given = {"betas": args.opt_betas, "eps": args.opt_eps}
    options = {name: value for name, value in given.items() if value is not None}
    common = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum}
    try:
        return create_optimizer_v2(model, opt=args.opt, **common, **options)
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"--opt {args.opt}: {' '.join(str(error).split())}") from error


def build_rate(args: Namespace, epochs: int, epoch_steps: int, by_step: bool) -> Callable[[int], float]:
    """Step -> factor of the peak learning rate, from timm's scheduler: a function of the step alone."""
    shadow = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, _ = create_scheduler_v2(
        shadow,
        sched=args.sched,
        num_epochs=epochs,
        min_lr=args.min_lr / args.lr,
        warmup_lr=args.warmup_lr / args.lr,
        warmup_epochs=args.warmup_epochs,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
        step_on_epochs=not by_step,
        updates_per_epoch=epoch_steps,
    )

    def rate(step: int) -> float:
        if scheduler is not None:
            if by_step:
                scheduler.step_update(step)
            else:
                scheduler.step(step // epoch_steps)
        return shadow.param_groups[0]["lr"]

    return rate


class Labelled:
    """The preparation of a batch of labelled images before the model sees it, and its loss.

    Mixup and cutmix draw from (seed, number of the batch).
    """

    def __init__(self, args: Namespace, classes: int):
        self.seed, self.mixup = args.seed, None
        if args.mixup > 0 or args.cutmix > 0:
            shares = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "prob": args.mixup_prob}
            self.mixup = Mixup(**shares, label_smoothing=args.smoothing, num_classes=classes)
            self.criterion = SoftTargetCrossEntropy()
        elif args.smoothing:
            self.criterion = LabelSmoothingCrossEntropy(args.smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss()

    def prepared(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """{"image": (B, 3, H, W), "label": (B,)}, mixed where it is asked for: then the labels are (B, classes)."""
        if self.mixup is None:
            return batch
        even = len(batch["label"]) // 2 * 2  # images are mixed in pairs; one may be missing that could not be read
        batch = {name: value[:even] for name, value in batch.items()}
        _, rng = sample_generator(number, 1, self.seed)
        with drawing(rng):
            image, label = self.mixup(batch["image"], batch["label"])
        return batch | {"image": image, "label": label}

    def read(
        self, train: Dataset, batch_size: int, gather: Gather, *, place: Place, start: int, **order: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches of `datasets.loaders.loader` as `prepared` makes them, with what was skipped beside it.

        A batch of which fewer than two images could be read has none left where images are mixed in pairs.
        """
        for number, batch in enumerate(loader(train, batch_size, gather, place=place, start=start, **order), start):
            skipped = {"skipped": batch.pop("skipped")} if "skipped" in batch else {}
            if batch and self.mixup is not None and "label" not in batch:
                raise UserError("mixup and cutmix mix labels, and these images have none: leave them out")
            few = not batch or (self.mixup is not None and len(batch["label"]) < 2)
            yield skipped | ({} if few else self.prepared(batch, place.batch(number)))

    def loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        return self.criterion(logits.float(), batch["label"])
