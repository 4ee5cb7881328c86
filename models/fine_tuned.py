"""Fine-tuned models of this project, from their weights alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import models
from models.checkpoint import image_size_of
from sparsity.view import PrunableView


def load_task(name: str, task: str, sizes: Any, weights: str | Path | None) -> tuple[PrunableView, Any, int]:
    """Return a model that was fine-tuned for a task, its sizes, and the side in pixels of the images that it was tuned
    on, which its position table says. sizes: of the pretrained model. weights: None for random ones.
    """
    module, own = models.find(name), models.find_task(name, task)
    labels = models.kind(name) == "labels"
    vision = sizes if labels else sizes.vision
    side = weights and image_size_of(weights, module.POSITIONS, vision.patch_size)
    vision = replace(vision, image_size=side or vision.image_size)
    sizes = vision if labels else replace(sizes, vision=vision)
    words = module.tokenizer(sizes) if task == "captioning" else None
    marks = {"prompt": [words.cls_id], "end": words.sep_id, "pad": words.pad_id} if words else {}
    return own.prunable_view(own.build(sizes, weights, **marks).eval()), sizes, vision.image_size
