"""DiT (arXiv 2212.09748): a transformer that predicts noise, conditioned by adaLN-Zero, under its published names.

The names are those of the official checkpoints, `DiT-XL-2-256x256.pt` and so on. Shapes: B samples, C channels, H x W
of the latents (or the pixels), L patches, V width, P = patch_size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import WRAPPERS, load_weights
from models.dino import model as dino
from models.dit.diffusion import Diffusion, Noise, sample
from models.dit.sizes import Config as Config
from sparsity.errors import UserError
from sparsity.view import Output, Outputs, PrunableView

KEPT_DENSE = ("final_layer.linear",)  # the output head
REBUILT = ("pos_embed",)  # state that a checkpoint need not have, since it is made anew
EMA = "ema"  # key of the moving average in a checkpoint of training
JUDGE = dino  # whose features tell how far samples are from images

GUIDED = 3  # channels to which guidance is applied, as in the published code: of pixels, all
_FREQUENCIES = 256  # numbers that a time is embedded in


class TimestepEmbedder(nn.Module):
    """Times (B,) -> (B, V)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(sinusoids(time))


def sinusoids(time: Tensor) -> Tensor:
    """Times (B,) -> cosines and sines of them at 128 frequencies from 1 down to 1e-4, (B, 256)."""
    half = _FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, V); the last row of the table is that of the null class, where there is one."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + (config.null_class is not None), config.width)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class PatchEmbed(nn.Module):
    """Samples (B, C, H, W) -> (B, L, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, V)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, V / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, L, V) by shift and scale (B, V)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Block(nn.Module):
    """Tokens (B, L, V), conditioned on (B, V) by adaLN-Zero: at first it changes nothing."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(config.width)
        self.adaLN_modulation = _modulation(config.width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition).chunk(6, 1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, L, V) -> patches (B, L, P * P * output channels)."""

    def __init__(self, config: Config, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.width, config.patch_size**2 * channels)
        self.adaLN_modulation = _modulation(config.width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(condition).chunk(2, 1)))


class DiT(nn.Module):
    """`model(x, time, label)` predicts; `model.losses(batch)` are those of a batch of clean samples."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(sincos_positions(config.width, config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config, config.channels * (1 + config.learn_sigma))

    @torch.no_grad()
    def initialise(self) -> "DiT":
        """Random weights for training from scratch, as published: every block is the identity, the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                module.bias.zero_()
        self.y_embedder.embedding_table.weight.normal_(0.0, 0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            layer.weight.normal_(0.0, 0.02)
        zero = [holder.adaLN_modulation[1] for holder in (*self.blocks, self.final_layer)]
        for layer in (*zero, self.final_layer.linear):
            layer.weight.zero_()
        return self

    def diffusion(self) -> Diffusion:
        """The diffusion that the model belongs to."""
        config = self.config
        learned = {"learned_variance": config.learn_sigma, "clip": config.pixels}
        return Diffusion(config.schedule, config.prediction, **learned)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """x_t (B, C, H, W), times (B,) and labels (B,) -> the prediction, (B, C or 2 C, H, W)."""
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(time) + self.y_embedder(label)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._unpatch(self.final_layer(tokens, condition))

    def _unpatch(self, patches: Tensor) -> Tensor:
        side, grid = self.config.patch_size, self.config.grid
        x = patches.unflatten(1, (grid, grid)).unflatten(-1, (side, side, -1))  # (B, g, g, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def guided(self, x: Tensor, time: Tensor, label: Tensor, scale: float) -> Tensor:
        """The prediction with classifier-free guidance (arXiv 2207.12598): away from that for the null class. A scale
        of 1 is none. UserError where the model has no null class.
        """
        if scale == 1:
            return self(x, time, label)
        if self.config.null_class is None:
            raise UserError("this model was trained without a null class: use a guidance scale of 1")
        null = torch.full_like(label, self.config.null_class)
        both = self(x.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([label, null]))
        own, free = both.chunk(2)
        mixed = free[:, :GUIDED] + scale * (own[:, :GUIDED] - free[:, :GUIDED])
        return torch.cat([mixed, own[:, GUIDED:]], 1)

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int],
        *,
        steps: int,
        seed: int = 0,
        first: int = 0,
        sampler: str = "ddim",
        scale: float = 1.0,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """Samples (B, C, H, W) of these classes in `steps` steps, on the model's device. scale: of the guidance. Sample
        i is number first + i of its seed, and the same beside whatever others. progress: wraps the steps.
        """
        device = self.pos_embed.device
        label = torch.tensor(labels, device=device)
        noise = Noise(seed, range(first, first + len(labels)), self.config.shape)
        options = {"sampler": sampler, "device": device, "progress": progress}
        predict = partial(self.guided, label=label, scale=scale)
        return sample(predict, self.diffusion().respaced(steps), noise, **options)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The "loss" and its parts for `batch` = {"image": clean samples (B, C, H, W), "noise": the same shape, "time":
        (B,), "label": (B,)}.
        """
        diffusion = self.diffusion()
        clean, noise, time = batch["image"], batch["noise"], batch["time"]
        output = self(diffusion.noised(clean, noise, time), time, batch["label"])
        return diffusion.losses(output.float(), clean, noise, time)


def sincos_positions(width: int, grid: int) -> Tensor:
    """The fixed position table (1, grid * grid, width): a quarter each of sines and cosines of the column, then of the
    row.
    """
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, width / 2)
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], 1)[None].float()


def build(config: Config, weights: str | Path | None = None, *, ema: bool = True) -> DiT:
    """A model of these sizes with the weights of a file, or random ones.

    ema: of a file {"ema": ..., "model": ...}, as training writes it, the moving average counts, not the last weights.
    """
    model = DiT(config).initialise()
    if weights is not None:
        load_weights(model, weights, ignored=REBUILT, wrappers=(EMA, *WRAPPERS) if ema else WRAPPERS)
    return model


def outputs(model: DiT, batch: dict[str, Tensor]) -> Outputs:
    """Return the prediction for noised samples, (B, C or 2 C, H * W)."""
    x = model.diffusion().noised(batch["image"], batch["noise"], batch["time"])
    return {"prediction": Output("states", model(x, batch["time"], batch["label"]).flatten(2))}


def prunable_view(model: DiT) -> PrunableView:
    """The linear layers in one group, "transformer"; the output head is kept dense.

    Batches are those of `DiT.losses`.
    """

    def forward(batch: dict[str, Tensor]) -> Tensor:
        x = model.diffusion().noised(batch["image"], batch["noise"], batch["time"])
        return model(x, batch["time"], batch["label"])

    return PrunableView(
        model,
        group_of=lambda name: "transformer",
        keep_dense=KEPT_DENSE,
        forward=forward,
        loss=lambda batch, generator=None: model.losses(batch)["loss"],
        blocks=list(model.blocks),
        outputs=outputs,
    )
