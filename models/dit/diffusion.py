"""Gaussian diffusion: noise schedules, losses and samplers, apart from the network that predicts.

DDPM (arXiv 2006.11239), learned variances and respacing (improved DDPM, arXiv 2102.09672), DDIM (arXiv 2010.02502),
velocity prediction (arXiv 2202.00512). x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t is the product of the
1 - beta. Shapes: B samples, C channels, H x W; `step` (B,) counts the times that are kept, from 0, the cleanest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import UserError

STEPS = 1000  # times of a schedule
_HALF_BIN = 1 / 255  # of an image in [-1, 1] with 256 levels


def linear_betas(steps: int = STEPS) -> Tensor:
    """From 1e-4 to 0.02 over 1000 steps, (steps,) float64; with fewer steps as much noise in all."""
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)


def cosine_betas(steps: int = STEPS) -> Tensor:
    """a_t = cos^2 of t / T, slightly shifted; betas of at most 0.999, (steps,) float64 (arXiv 2102.09672, eq. 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


def spaced(steps: int, kept: int) -> Tensor:
    """`kept` of the times 0 .. steps - 1, evenly from the first to the last, (kept,) int64 ascending. UserError unless
    2 <= kept <= steps.
    """
    if not 2 <= kept <= steps:
        raise UserError(f"the number of sampling steps must be from 2 to {steps}, got {kept!r}")
    return torch.tensor([round(i * (steps - 1) / (kept - 1)) for i in range(kept)])


@dataclass(frozen=True)
class Estimate:
    """The estimate in a network's output: the clean sample and the noise, (B, C, H, W), and the logarithm of the
    variance of a step back.
    """

    clean: Tensor
    noise: Tensor
    log_variance: Tensor


class Diffusion:
    """A schedule, or some times of it.

    Args:
        schedule: "linear" or "cosine".
        prediction: what the first C channels of the network's output are: the "noise", or the "velocity" sqrt(a) noise
            - sqrt(1 - a) x_0.
        learned_variance: C more channels say where between its two bounds the logarithm of the variance lies, from -1
            to 1; else the variance is the lower bound, that of q(x_{t-1} | x_t, x_0).
        clip: samples lie in [-1, 1], and so do estimates of them.
        kept: how many times are used; all of them by default.
        steps: times of the schedule.
    """

    def __init__(
        self,
        schedule: str = "linear",
        prediction: str = "noise",
        *,
        learned_variance: bool = False,
        clip: bool = False,
        kept: int | None = None,
        steps: int = STEPS,
    ):
        self.schedule, self.prediction, self.steps = schedule, prediction, steps
        self.learned_variance, self.clip = learned_variance, clip
        self.times = torch.arange(steps) if kept is None else spaced(steps, kept)
        self.alphas = torch.cumprod(1 - SCHEDULES[schedule](steps), 0)[self.times]  # a, (S,) float64
        self.alphas_before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas[:-1]])
        self.betas = 1 - self.alphas / self.alphas_before
        variances = self.betas * (1 - self.alphas_before) / (1 - self.alphas)
        self.log_variances = torch.cat([variances[1:2], variances[1:]]).log()  # that of the last step back would be 0

    def __len__(self) -> int:
        return len(self.times)

    def respaced(self, kept: int) -> "Diffusion":
        """Return the same diffusion with this many times."""
        options = {"learned_variance": self.learned_variance, "clip": self.clip, "steps": self.steps}
        return Diffusion(self.schedule, self.prediction, kept=kept, **options)

    def noised(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """x_t of clean samples (B, C, H, W)."""
        return _at(self.alphas.sqrt(), step, clean) * clean + _at((1 - self.alphas).sqrt(), step, clean) * noise

    def target(self, clean: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Return what the network should predict, (B, C, H, W)."""
        if self.prediction == "noise":
            return noise
        return _at(self.alphas.sqrt(), step, clean) * noise - _at((1 - self.alphas).sqrt(), step, clean) * clean

    def estimate(self, output: Tensor, x: Tensor, step: Tensor, *, clip: bool | None = None) -> Estimate:
        """Return the estimate in the output (B, C or 2 C, H, W) for x_t; clip: in place of the diffusion's own."""
        predicted, between = output.chunk(2, 1) if self.learned_variance else (output, None)
        signal, noise_scale = (_at(scale.sqrt(), step, x) for scale in (self.alphas, 1 - self.alphas))
        if self.prediction == "noise":
            clean = (x - noise_scale * predicted) / signal
        else:
            clean = signal * x - noise_scale * predicted
        clean = clean.clamp(-1, 1) if (self.clip if clip is None else clip) else clean
        noise = (x - signal * clean) / noise_scale
        low, high = _at(self.log_variances, step, x), _at(self.betas.log(), step, x)
        share = 0 if between is None else (between + 1) / 2
        return Estimate(clean, noise, share * high + (1 - share) * low)

    def mean(self, clean: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), (B, C, H, W) (arXiv 2006.11239, eq. 7)."""
        of_clean = self.alphas_before.sqrt() * self.betas / (1 - self.alphas)
        of_x = (1 - self.betas).sqrt() * (1 - self.alphas_before) / (1 - self.alphas)
        return _at(of_clean, step, x) * clean + _at(of_x, step, x) * x

    def losses(self, output: Tensor, clean: Tensor, noise: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Mean squared error of the prediction; with a learned variance the bound is added, which moves the variance
        alone (L_hybrid of arXiv 2102.09672, unscaled as in arXiv 2212.09748).
        """
        predicted = output.chunk(2, 1)[0] if self.learned_variance else output
        error = (predicted - self.target(clean, noise, step)).square().mean()
        if not self.learned_variance:
            return {"loss": error}
        fixed = torch.cat([predicted.detach(), output.chunk(2, 1)[1]], 1)
        bound = self.bound(fixed, clean, self.noised(clean, noise, step), step).mean()
        return {"loss": error + bound, "mse": error, "vlb": bound}

    def bound(self, output: Tensor, clean: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """The step's term of the variational bound in bits per dimension, (B,): KL(q || p), for the last step back the
        likelihood of the 256 levels.
        """
        estimate = self.estimate(output, x, step, clip=False)
        mean, own = self.mean(estimate.clean, x, step), estimate.log_variance
        true_mean, true = self.mean(clean, x, step), _at(self.log_variances, step, x)
        divergence = 0.5 * (own - true - 1 + (true - own).exp() + (true_mean - mean).square() * (-own).exp())
        likelihood = -_log_likelihood(clean, mean, 0.5 * own)
        bits = torch.where(step.view(-1, 1, 1, 1) == 0, likelihood, divergence) / math.log(2)
        return bits.flatten(1).mean(1)


def ddpm(diffusion: Diffusion, output: Tensor, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """A step back with the variance of DDPM: x_t (B, C, H, W) -> x_{t-1}; the last adds no noise."""
    estimate = diffusion.estimate(output, x, step)
    scale = (step > 0).view(-1, 1, 1, 1) * (0.5 * estimate.log_variance).exp()
    return diffusion.mean(estimate.clean, x, step) + scale * noise


def ddim(diffusion: Diffusion, output: Tensor, x: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """A step back without noise, DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""
    estimate = diffusion.estimate(output, x, step)
    before = diffusion.alphas_before
    return _at(before.sqrt(), step, x) * estimate.clean + _at((1 - before).sqrt(), step, x) * estimate.noise


Sampler = Callable[[Diffusion, Tensor, Tensor, Tensor, Tensor], Tensor]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim}


class Noise:
    """Normal noise (B, *shape) on the CPU: sample n has a stream of its own, of (seed, n) alone."""

    def __init__(self, seed: int, numbers: Sequence[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed((seed << 24) + n) for n in numbers]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    noise: Noise,
    *,
    sampler: str = "ddpm",
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Samples (B, C, H, W), one for each stream of `noise`, whatever the others are.

    predict: x_t and times (B,) of the schedule -> the network's output. progress: wraps the steps, as tqdm does.
    """
    back = SAMPLERS[sampler]
    x = noise().to(device)
    for i in progress(range(len(diffusion) - 1, -1, -1)):
        step = torch.full((len(x),), i)
        output = predict(x, diffusion.times[step].to(device)).float()
        x = back(diffusion, output, x, step, noise().to(device) if sampler == "ddpm" else x)
    return x


def _at(values: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """The values (S,) at the steps (B,), to be multiplied with `like` (B, C, H, W)."""
    return values.to(like.device, torch.float32)[step.to(like.device)].view(-1, 1, 1, 1)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-likelihood of images in [-1, 1] with 256 levels under a discretised normal distribution,
    elementwise (arXiv 2006.11239, eq. 13).
    """
    centred, inverse = x - mean, (-log_scale).exp()
    above = _normal_cdf(inverse * (centred + _HALF_BIN))
    below = _normal_cdf(inverse * (centred - _HALF_BIN))
    middle = (above - below).clamp(min=1e-12).log()
    lowest, highest = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, middle))


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the normal CDF by the tanh approximation of the published code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
