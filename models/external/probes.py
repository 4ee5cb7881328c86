"""Probes by which a pruned model is compared with the dense one: its towers, the inputs of its heads, its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.external.layer_names import TEXT
from models.external.libraries import Library, library_of, seeded
from sparsity.view import PrunableView, eager, module_name

EMBEDDINGS = {"image_embeds": "vision", "text_embeds": "text"}  # of models that compare images and texts -> tower
LOGITS = ("logits", "logits_per_image")  # fields of an output
IGNORED = -100  # label of what is not predicted


@dataclass(frozen=True)
class Probes:
    """Name what is looked at.

    towers: group -> the module whose output are its features. pooled: name -> the head that reads what is pooled. real:
    (group, batch) -> bool (B, T), which tokens of a text are no padding; None: all. run: batch -> output, with logits,
    embeddings and what else the model returns.
    """

    towers: Mapping[str, nn.Module]
    pooled: Mapping[str, nn.Module]
    real: Callable[[str, Any], Tensor | None]
    run: Callable[[Any], Any]
    library: Library = field(repr=False)

    def embeddings(self, output: Any) -> dict[str, Tensor]:
        """Return tower -> (B, d), of models that compare images with texts."""
        named = output if isinstance(output, Mapping) else {}
        return {tower: named[name] for name, tower in EMBEDDINGS.items() if isinstance(named.get(name), Tensor)}

    def predictions(self, output: Any, batch: Any) -> tuple[Tensor, Tensor | None, bool] | None:
        """Return logits (B, ..., C), the label of each position (B, ...), `IGNORED` where there is none to predict, and
        whether they are words; None for a model without.
        """
        named = isinstance(output, Mapping)
        logits = next((output[key] for key in LOGITS if key in output), None) if named else output
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or not logits.is_floating_point():
            return None
        labels = self.library.labels(batch)
        if labels is None or labels.shape != logits.shape[:-1]:
            return logits, None, False
        if logits.ndim == 3 and self.library.shifts:  # the logits at a token predict the next one
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        return logits, labels, logits.ndim == 3


def probes(model: nn.Module, view: PrunableView) -> Probes:
    """Return where to look: each group's last block, or its last layer where it has none, and what the heads read."""
    library, names = library_of(model), {id(module): name for name, module in model.named_modules()}
    last = {weight.group: weight for weight in view.weights.values()}
    towers = {group: _block_of(weight.modules[0], view) for group, weight in last.items()}

    def real(group: str, batch: Any) -> Tensor | None:
        field = library.text_field(last[group].name) if group == TEXT and isinstance(batch, Mapping) else None
        mask = batch.get(field) if field else None
        return None if mask is None else mask != 0

    def run(batch: Any) -> Any:
        with eager(model), seeded(0, next(model.parameters())):
            return library.output(library.fitted(batch))

    heads = {module_name(names[id(m)]): m for m in _linear_heads(model, library) if id(m) in names}
    return Probes(towers, heads, real, run, library)


def _block_of(layer: nn.Module, view: PrunableView) -> nn.Module:
    """The outermost block with a layer in it, or the layer."""
    around = (block for block in view.blocks or () if any(module is layer for module in block.modules()))
    return next(around, layer)  # an outer block stands before those in it


def _linear_heads(model: nn.Module, library: Library) -> list[nn.Module]:
    """The linear layers that make the output."""
    heads = library.heads()
    found = [m for n, m in model.named_modules() if n in heads]
    return [next((m for m in head.modules() if isinstance(m, nn.Linear)), head) for head in found]
