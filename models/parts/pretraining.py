"""Pretraining: what is trained around a model, and thrown away afterwards."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Around(nn.Module):
    """Holds the model as `model`, and gives its losses."""

    @property
    def result(self) -> nn.Module:
        """The model whose weights are kept."""
        return self.model

    def on_step(self) -> None:
        """Called after each step of the optimizer: what follows the weights moves here, once, not with each batch."""


class Sources(Around):
    """Sum of the losses over sources ("general", "region"): one forward for all of them, as DDP wants it.

    model: any whose forward returns a dict of losses, with `on_step`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sources: dict[str, dict], **options) -> dict[str, Tensor]:
        """`{source: batch}` -> "loss" and every part as "source/part"; options go to the model."""
        losses = {}
        for source, batch in sources.items():
            losses |= {f"{source}/{name}": value for name, value in self.model(batch, **options).items()}
        return {"loss": sum(losses[f"{source}/loss"] for source in sources), **losses}

    def on_step(self) -> None:
        self.model.on_step()


class FineLabels(Around):
    """A classifier that learns from finer labels, too, through a second head: more to be learnt from each image.

    model: has `features`, images (B, 3, H, W) to (B, V), and `classifier`, which reads them.
    """

    def __init__(self, model: nn.Module, fine_classes: int, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.head = nn.Linear(model.classifier.in_features, fine_classes)

    def forward(self, image: Tensor, label: Tensor, fine_label: Tensor) -> dict[str, Tensor]:
        """Both cross-entropies, their sum "loss", and the share of right answers of the classifier."""
        features = self.model.features(image)
        logits = self.model.classifier(features).float()
        coarse = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        fine = F.cross_entropy(self.head(features).float(), fine_label, label_smoothing=self.label_smoothing)
        right = (logits.detach().argmax(1) == label).float().mean()
        return {"loss": coarse + fine, "coarse": coarse, "fine": fine, "accuracy": right}


class Denoising(Around):
    """The losses of a model that predicts noise; what is kept is a moving average of its weights.

    model: has `losses`, of a batch as `datasets.bundled.generation.Noised` has it. decay: of the average; it begins
    lower, at (1 + n) / (10 + n) in step n.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.model, self.decay = model, decay
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def result(self) -> nn.Module:
        return self.average

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """The losses of the model."""
        return self.model.losses(batch)

    @torch.no_grad()
    def on_step(self) -> None:
        """The weights go into the average."""
        share = 1 - min(self.decay, (1 + int(self.steps)) / (10 + int(self.steps)))
        self.steps += 1
        for mean, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(parameter, share)


AROUND = {"pairs": Sources, "labels": FineLabels, "noise": Denoising}  # by the kinds in models.KINDS
