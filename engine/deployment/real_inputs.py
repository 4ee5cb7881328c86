"""Bundled images and captions as inputs of the parts of a model, each of which reads what those before it give."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.text import TextEncoder
from engine.deployment.onnx_files import Graph

IMAGES = ("image", "pixel_values")  # how parts name an image
STEP = "step"  # the part that reads the beginning of a text, without padding
SCENES = 5


def bundled_inputs(graphs: Sequence[Graph], encode: TextEncoder | None) -> dict[str, Tensor]:
    """Return real inputs by the names that the parts have for them: images, and captions where it is known how the
    model reads them.
    """
    names = {name: example.shape[-1] for graph in graphs for name, example in graph.inputs.items() if name in IMAGES}
    found = {}
    for name, side in names.items():
        scenes = BundledRetrieval(load_glyphs(), "scenes", SCENES, side=side)
        found[name] = torch.stack([scenes[i]["image"].to("cpu") for i in range(SCENES)])
        if encode:
            texts = encode.plain([scenes.scene(i).caption for i in range(SCENES)])
            found |= {"ids": texts["text_ids"], "atts": texts["text_atts"]}
    return found


@torch.no_grad()
def real_inputs(graphs: Sequence[Graph], bundled: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the inputs of each part: bundled ones, or what parts before it give for them; empty where it reads others.

    graphs: in the order in which they are run.
    """
    known, found = dict(bundled), []
    for graph in graphs:
        inputs = {name: known[name] for name in graph.inputs if name in known}
        if len(inputs) < len(graph.inputs):
            found.append({})
            continue
        if graph.name == STEP:
            inputs["ids"] = inputs["ids"][:, : int(known["atts"].sum(1).min())]
        outputs = graph.module.eval()(*inputs.values())
        known |= zip(graph.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        found.append(inputs)
    return found
