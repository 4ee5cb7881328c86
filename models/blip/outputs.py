"""What BLIP gives for a batch of pairs, as a pruned model is taught to give it."""

from typing import Any

import torch

from sparsity.view import Output, Outputs


def outputs(model: Any, batch: dict) -> Outputs:
    """Return the features of both towers, whether text i matches its own image and the image of text i + 1, and the
    decoder's logits of the token after each.
    """
    ids, atts = batch["text_ids"], batch["text_atts"]
    image, image_feature = model.encode_image(batch["image"])
    grounded, text_feature = model.encode_text(ids, atts)
    started = torch.cat([torch.full_like(ids[:, :1], model.decoder_start), ids[:, 1:]], 1)
    return {
        "image": Output("embedding", image_feature),
        "text": Output("embedding", text_feature),
        "match": Output("logits", model.match(grounded, atts, image)),
        "mismatch": Output("logits", model.match(grounded, atts, image.roll(-1, 0))),
        "words": Output("logits", model.decode(started, atts, image), real=atts.bool()),
    }
