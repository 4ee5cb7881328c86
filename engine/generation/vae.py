"""Writing of samples: images as they are, or decoded from latents by a VAE, else files of latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.generation.sampling import save_grid
from sparsity.errors import UserError
from sparsity.files import replacing

_READ = 8  # latents decoded together
_SCALE = 0.18215  # of the latents of Stable Diffusion's VAE, on which DiT was trained


class VAE:
    """diffusers' AutoencoderKL, of a folder or a name on the hub. UserError where there is none."""

    def __init__(self, name: str, fabric: Any):
        from diffusers.models import AutoencoderKL

        try:
            self.vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False).to(fabric.device).eval()
        except Exception as error:  # of the network, the hub, the files: each its own kind
            raise UserError(f"--vae {name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        self.device = fabric.device

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> images (B, 3, 8 H, 8 W) in about [-1, 1]."""
        return torch.cat([self.vae.decode(part.to(self.device) / _SCALE).sample.cpu() for part in latents.split(_READ)])


def write_samples(path: Path, samples: Tensor, labels: Sequence[int], pixels: bool, vae: VAE | None) -> str:
    """Write samples as one picture, or latents without a VAE as `path`.safetensors; a line that says what is where."""
    if pixels or vae:
        save_grid(path, vae.decode(samples) if vae else samples)
        return str(path)
    path = path.with_suffix(".safetensors")
    with replacing(path) as temporary:
        save_file({"latents": samples, "labels": torch.tensor(labels)}, temporary)
    return f"{path} (latents: without --vae there are no images)"
