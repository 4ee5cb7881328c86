"""Losses of several sources in one forward."""

import torch

from models.parts.pretraining import Sources


def test_losses_add_up_over_sources(small_xvlm, small_batches):
    batches = {"general": small_batches["general"][0], "region": small_batches["region"][0]}
    options = {"objectives": ("itc", "mlm", "bbox"), "fused_pairs": 2}
    with torch.no_grad():
        losses = Sources(small_xvlm)(batches, **options)
        alone = {source: small_xvlm(batch, **options) for source, batch in batches.items()}
    parts = {f"{source}/{name}": value for source, found in alone.items() for name, value in found.items()}
    torch.testing.assert_close(losses, parts | {"loss": alone["general"]["loss"] + alone["region"]["loss"]})
    assert "region/bbox" in losses and "general/bbox" not in losses


def test_gradients_of_both_sources_reach_the_model(small_xvlm, small_batches):
    """The first forward's graph survives the second one, also in training, where the temperature is clamped."""
    batches = {"general": small_batches["general"][0], "region": small_batches["region"][0]}
    sources = Sources(small_xvlm.train())
    sources(batches)["loss"].backward()
    together = {name: p.grad.clone() for name, p in small_xvlm.named_parameters() if p.grad is not None}
    assert {"temp", "vision_proj.weight", "text_proj.weight", "bbox_head.0.weight"} <= set(together)
    assert all(gradient.isfinite().all() for gradient in together.values())
