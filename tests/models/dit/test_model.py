"""DiT against the published names and against diffusers' own."""

import argparse
import re

import pytest
import torch
from torch.nn import functional as F

from models.dit import model as dit
from models.dit import sizes as dit_sizes
from models.dit.diffusion import Noise
from models.parts.pretraining import Denoising

SIZES = {"image_size": 8, "patch_size": 2, "width": 32, "layers": 2, "heads": 2, "classes": 7}
THEIRS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")


def small(**changes):
    """A random model whose modulations are not zero, in evaluation mode."""
    torch.manual_seed(0)
    model = dit.build(dit.Config(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model


def inputs(model, n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *model.config.shape, generator=generator)
    return x, torch.tensor([0, 500, 999])[:n], torch.tensor([0, 3, 7])[:n]


def batch_of(model, n=3):
    x, time, label = inputs(model, n)
    return {"image": x.clamp(-1, 1), "noise": x.flip(0), "time": time, "label": label}


def theirs(model):
    """diffusers' DiT with the weights of `model`."""
    diffusers, c = pytest.importorskip("diffusers"), model.config
    twin = diffusers.DiTTransformer2DModel(
        num_attention_heads=c.heads,
        attention_head_dim=c.width // c.heads,
        in_channels=c.channels,
        out_channels=c.channels * (1 + c.learn_sigma),
        num_layers=c.layers,
        sample_size=c.image_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.classes,
    ).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith("attn.qkv"):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{layer.replace('attn.qkv', f'attn1.to_{part}')}.{kind}"] = third
        elif layer.startswith(("t_embedder", "y_embedder")):  # theirs has them in each block
            state |= {f"blocks.{i}.norm1.emb.{THEIRS[layer]}.{kind}": tensor for i in range(c.layers)}
        elif layer:  # not the positions, which theirs computes
            inside = re.sub(r"^blocks\.\d+\.", "", layer)
            state[f"{layer.removesuffix(inside)}{THEIRS[inside]}.{kind}"] = tensor
    state = {re.sub("^blocks", "transformer_blocks", name): tensor for name, tensor in state.items()}
    twin.load_state_dict(state)
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # the frequencies of the published code
    return twin


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_prediction_is_that_of_diffusers(learn_sigma):
    model = small(learn_sigma=learn_sigma)
    x, time, label = inputs(model)
    with torch.no_grad():
        expected = theirs(model)(x, timestep=time, class_labels=label).sample
        atol = 1e-4 * float(expected.abs().max())  # sums of large terms may be small
        torch.testing.assert_close(model(x, time, label), expected, rtol=1e-4, atol=atol)


def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = dit.DiT(dit_sizes.published("DiT-XL/2")).state_dict()
    layers = [f"blocks.{i}.{layer}" for i in range(28) for layer in BLOCK]
    layers += ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"]
    layers += ["final_layer.adaLN_modulation.1"]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(state) == names | {"pos_embed", "y_embedder.embedding_table.weight"}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["pos_embed"] == (1, 256, 1152) and shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2) and shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["blocks.0.attn.qkv.weight"] == (3456, 1152) and shapes["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert shapes["blocks.3.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2304, 1152)


@pytest.mark.parametrize(("name", "millions"), [("DiT-S/2", 33), ("DiT-B/4", 131), ("DiT-L/8", 459), ("DiT-XL/2", 675)])
def test_sizes_are_those_of_the_paper(name, millions):
    with torch.device("meta"):
        model = dit.DiT(dit_sizes.published(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_names():
    assert len(dit_sizes.names()) == 12 and dit_sizes.published("DiT-S/8", 512, 10).image_size == 64
    with pytest.raises(ValueError, match="there is no model 'DiT-M/2'; there are DiT-S/2"):
        dit_sizes.published("DiT-M/2")
    with pytest.raises(ValueError, match="must be a multiple of 32, got 250"):
        dit_sizes.published("DiT-XL/4", 250)


def test_a_new_model_predicts_nothing_and_changes_nothing():
    model = dit.build(dit.Config(**SIZES))
    x, time, label = inputs(model)
    assert not model(x, time, label).any()
    tokens = torch.randn(2, 16, 32)
    torch.testing.assert_close(model.blocks[0](tokens, torch.randn(2, 32)), tokens, rtol=0, atol=0)


def test_guidance():
    model = small(prediction="velocity", channels=3, learn_sigma=False)
    x, time, label = inputs(model)
    with torch.no_grad():
        own, free = model(x, time, label), model(x, time, torch.full_like(label, 7))
        torch.testing.assert_close(model.guided(x, time, label, 4.0), free + 4 * (own - free), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.guided(x, time, label, 1.0), own, rtol=0, atol=0)
    without = small(class_dropout=0.0)
    assert without.y_embedder.embedding_table.weight.shape == (7, 32)
    with pytest.raises(ValueError, match="without a null class"):
        without.guided(x[:, :1].expand(3, 4, 8, 8), time, label.clamp(max=6), 2.0)


def test_guidance_of_latents_is_on_three_channels_as_published():
    model = small()
    x, time, label = inputs(model)
    with torch.no_grad():
        own, free = model(x, time, label), model(x, time, torch.full_like(label, 7))
        mixed = model.guided(x, time, label, 4.0)
    torch.testing.assert_close(mixed[:, :3], (free + 4 * (own - free))[:, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[:, 3:], own[:, 3:], rtol=1e-4, atol=1e-5)


def test_samples_are_a_function_of_seed_and_number():
    model = small()
    draw = {"steps": 3, "sampler": "ddpm"}
    both = model.sample([1, 2], seed=5, **draw)
    torch.testing.assert_close(both, model.sample([1, 2], seed=5, **draw), rtol=0, atol=0)
    torch.testing.assert_close(both[1:], model.sample([2], seed=5, first=1, **draw), rtol=1e-4, atol=1e-5)
    assert not torch.equal(both, model.sample([1, 2], seed=6, **draw))
    assert not torch.equal(both, model.sample([1, 2], seed=5, scale=3.0, **draw))


def test_the_whole_sampling_is_that_of_diffusers(monkeypatch):
    """Model, guidance and scheduler together, with the same noise."""
    diffusers = pytest.importorskip("diffusers")
    model = small(learn_sigma=False, channels=3)
    twin, label = theirs(model), torch.tensor([1, 4])
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace", clip_sample=False, variance_type="fixed_small"
    )
    scheduler.set_timesteps(5)
    noise = Noise(9, range(2), model.config.shape)
    x = noise()
    module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: noise())
    with torch.no_grad():
        for time in scheduler.timesteps:
            own, free = (
                twin(x, timestep=time.expand(2), class_labels=labels).sample
                for labels in (label, torch.full_like(label, 7))
            )
            x = scheduler.step(free + 1.5 * (own - free), time, x).prev_sample
    ours = model.sample([1, 4], steps=5, seed=9, sampler="ddpm", scale=1.5)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_prunable_is_every_linear_layer_but_the_head():
    model = small()
    view = dit.prunable_view(model)
    assert view.dense == ("final_layer.linear.weight",) and list(view.groups) == ["transformer"]
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(view.weights) == linear - {"final_layer.linear.weight"} and len(view.weights) == 2 + 2 * 5 + 1
    batch = batch_of(model)
    x = model.diffusion().noised(batch["image"], batch["noise"], batch["time"])
    with torch.no_grad():
        torch.testing.assert_close(view.forward(batch), model(x, batch["time"], batch["label"]), rtol=0, atol=0)
    view.loss(batch).backward()
    assert all(weight.parameter.grad.abs().sum() > 0 for weight in view.weights.values())


def test_the_loss_is_the_error_of_the_predicted_noise():
    model = small(learn_sigma=False)
    batch = batch_of(model)
    predicted = dit.prunable_view(model).forward(batch)
    torch.testing.assert_close(model.losses(batch)["loss"], F.mse_loss(predicted, batch["noise"]))


def test_checkpoints_with_a_moving_average(tmp_path):
    ema, last = small(), small()
    with torch.no_grad():
        last.final_layer.linear.bias.add_(1)
    path = tmp_path / "0400000.pt"
    args = argparse.Namespace(model="DiT-XL/2")  # as the published training script leaves it
    torch.save({"ema": ema.state_dict(), "model": last.state_dict(), "opt": {}, "args": args}, path)
    for chosen, expected in ((True, ema), (False, last)):
        loaded = dit.build(ema.config, path, ema=chosen)
        assert all(torch.equal(t, expected.state_dict()[name]) for name, t in loaded.state_dict().items())
    torch.save(last.state_dict(), path)  # a bare one serves both
    assert torch.equal(dit.build(ema.config, path).final_layer.linear.bias, last.final_layer.linear.bias)
    with pytest.raises(ValueError, match="weights of another model: .*y_embedder.embedding_table.weight"):
        dit.build(dit.Config(**SIZES | {"classes": 9}), path)


def test_the_result_of_training_is_a_moving_average():
    around = Denoising(small(), decay=0.5).train()
    before = around.model.final_layer.linear.bias.clone()
    batch = batch_of(around.model)
    with torch.no_grad():
        around.model.final_layer.linear.bias.add_(1)
    loss = around(**batch)["loss"]
    loss.backward()
    assert torch.equal(around.result.final_layer.linear.bias, before)
    around.on_step()
    torch.testing.assert_close(around.result.final_layer.linear.bias, before + 0.9)  # (1 + 0) / (10 + 0) of the old
    around(**batch)
    torch.testing.assert_close(around.result.final_layer.linear.bias, before + 0.9)
    assert all(p.grad is None for p in around.result.parameters())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 36}, "width must be a multiple of 4 x heads = 8"),
        ({"patch_size": 3}, "image_size must be a multiple of patch_size 3"),
        ({"schedule": "sigmoid"}, "schedule must be one of linear, cosine"),
        ({"prediction": "x0"}, "prediction must be one of noise, velocity"),
        ({"class_dropout": 1.5}, "class_dropout must be a fraction"),
    ],
)
def test_sizes_that_cannot_be(change, told):
    with pytest.raises(ValueError, match=told):
        dit.Config(**SIZES | change)
