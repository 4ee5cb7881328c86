"""How images are prepared by an image processor: what is measured is what the processor was told."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from timm.data import create_transform

from models.foreign.images import of_transformers
from sparsity.errors import UserError

pytestmark = pytest.mark.script  # long: left out of make test-fast

SIZE = {"height": 24, "width": 24}
PROCESSORS = {
    "vit": (transformers.ViTImageProcessor(size=SIZE), [0.5] * 3, [0.5] * 3),
    "clip": (
        transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SIZE),
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    ),
    "plain": (transformers.ViTImageProcessor(size=SIZE, do_normalize=False), [0.0] * 3, [1.0] * 3),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_size_mean_and_deviation_are_measured(kind):
    processor, mean, std = PROCESSORS[kind]
    settings = of_transformers("x", processor).settings
    assert settings["input_size"] == (3, 24, 24)
    assert settings["mean"] == pytest.approx(mean, abs=1e-6)
    assert settings["std"] == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_is_trained_on_is_normalised_as_what_is_tested_on(kind):
    """An image of the model's own size, with nothing drawn: timm's transform gives the processor's tensor."""
    prepared = of_transformers("x", PROCESSORS[kind][0])
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    trained = create_transform(**prepared.settings, is_training=True, no_aug=True)(image)
    torch.testing.assert_close(trained, prepared.evaluate(image), atol=1e-5, rtol=1e-5)


def test_images_of_sizes_of_their_own_are_refused():
    processor = transformers.ViTImageProcessor(do_resize=False)
    with pytest.raises(UserError, match="does not make images of one size"):
        of_transformers("x", processor)
