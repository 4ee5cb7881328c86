"""DINO fine-tuned for image classification: cross-entropy on the class token (arXiv 2104.14294).

Shapes as in models/dino/model.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import find_weights, load_weights, read_weights
from models.dino import model as dino
from models.parts.task_model import TaskModel
from sparsity.view import Outputs, PrunableView

TEXT: dict[str, Any] = {}  # there is none
NEW = ("classifier.*",)


class DINOClassification(dino.ViTForImageClassification, TaskModel):
    """label_smoothing: of the loss in training, 0 to 1."""

    def __init__(self, config: dino.Config, label_smoothing: float = 0.0):
        super().__init__(config)
        self.label_smoothing = label_smoothing

    def forward(self, batch: dict[str, Tensor], epoch: float = 0.0) -> dict[str, Tensor]:
        """Cross-entropy of `batch` = {"image": (B, 3, H, W), "label": (B,)}."""
        return self._losses(self.classify(batch["image"]), batch)

    def taught(
        self, batch: dict[str, Tensor], epoch: float, outputs: Callable[[dict[str, Tensor]], Outputs]
    ) -> tuple[dict[str, Tensor], Outputs]:
        found = outputs(batch)
        return self._losses(found["logits"].tensor, batch), found

    def _losses(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """logits: (B, classes)."""
        return {"loss": F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.label_smoothing)}

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.vit.encoder.layer)


def task_names(name: str) -> tuple[str, ...]:
    return (dino.published_name(name),)


def build(
    config: dino.Config, weights: str | Path | None = None, *, keep: bool = True, **options: float
) -> DINOClassification:
    """Classifier of these sizes, from a checkpoint of DINO or of itself, or random.

    weights: a file, a folder that transformers saved, or a name on its hub. Its classifier counts where it has as many
    classes, and is to be kept; otherwise a random one is put in its place.
    """
    model = DINOClassification(config, **options).initialise()
    model.untaught = ("logits",)
    if weights is None:
        return model
    path = find_weights(weights)
    table = read_weights(path).get("classifier.weight")
    fresh = not keep or table is None or table.shape != model.classifier.weight.shape
    ignored = (*dino.HARMLESS, *(NEW if fresh else ()))
    load_weights(model, path, positions=dino.POSITIONS, ignored=ignored, rename=dino.published_name)
    model.untaught = ("logits",) if fresh else ()
    return model


def prunable_view(model: DINOClassification) -> PrunableView:
    """The weights that are prunable in DINO: all but the classifier, in one group."""
    return dino.prunable_view(model)
