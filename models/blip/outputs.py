"""Outputs of BLIP for a batch of pairs, as a pruned model is taught to give them."""

from typing import Any

import torch

from sparsity.view import Output, Outputs


def outputs(model: Any, batch: dict) -> Outputs:
    """Return those of `pair_outputs`, and the decoder's logits of the token after each."""
    ids, atts = batch["text_ids"], batch["text_atts"]
    image, image_feature = model.encode_image(batch["image"])
    started = torch.cat([torch.full_like(ids[:, :1], model.decoder_start), ids[:, 1:]], 1)
    words = Output("logits", model.decode(started, atts, image), real=atts.bool())
    return {**_of_pairs(model, batch, image, image_feature), "words": words}


def pair_outputs(model: Any, batch: dict) -> Outputs:
    """Return the features of both towers, and whether text i matches its own image and the image of text i + 1."""
    return _of_pairs(model, batch, *model.encode_image(batch["image"]))


def _of_pairs(model: Any, batch: dict, image: torch.Tensor, image_feature: torch.Tensor) -> Outputs:
    ids, atts = batch["text_ids"], batch["text_atts"]
    grounded, text_feature = model.encode_text(ids, atts)
    return {
        "image": Output("embedding", image_feature),
        "text": Output("embedding", text_feature),
        "match": Output("logits", model.match(grounded, atts, image)),
        "mismatch": Output("logits", model.match(grounded, atts, image.roll(-1, 0))),
    }
