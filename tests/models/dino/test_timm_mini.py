"""The bundled classifier as a model of timm."""

import timm
import torch
from timm.data import resolve_data_config

from configs.loading import load_config
from datasets.transforms import IMAGENET
from models.dino import model as dino
from models.dino.timm_mini import WEIGHTS, to_timm
from models.external import model as external


def test_it_is_the_bundled_classifier():
    ours = dino.build(load_config("configs/dino/model_mini.yaml", dino.Config), WEIGHTS).eval()
    model = timm.create_model("vit_mini", pretrained=True).eval()
    images = torch.randn(3, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), ours.classify(images), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())


def test_it_says_how_its_images_are_made():
    config = resolve_data_config({}, model=timm.create_model("vit_mini"))
    assert (config["mean"], config["std"]) == IMAGENET
    assert config["input_size"] == (3, 72, 72) and config["crop_pct"] == 1.0
    assert timm.create_model("vit_mini").num_classes == 76


def test_other_sizes_and_classes():
    model = timm.create_model("vit_mini", pretrained=True, img_size=96, num_classes=5)
    assert model.pos_embed.shape == (1, 65, 192) and model.head.weight.shape == (5, 192)
    again = timm.create_model("vit_mini", pretrained=True)
    assert torch.equal(model.blocks[3].attn.qkv.weight, again.blocks[3].attn.qkv.weight)
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in to_timm(dict(state), again).items())


def test_prune_takes_it_without_a_network(monkeypatch):
    for module in ("external.model", "hub"):
        monkeypatch.setattr(f"models.{module}.hub_answers", lambda: False)
    view = external.prunable_view(external.build("timm:vit_mini"))
    assert view.numel == 3_538_944 and len(view.blocks) == 8 and view.dense == ("head.weight",)
