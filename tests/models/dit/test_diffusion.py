"""Schedules, steps back and losses against diffusers' schedulers and against formulas written out."""

import math

import pytest
import torch

from models.dit import sizes as dit_sizes
from models.dit.diffusion import SCHEDULES, Diffusion, Noise, cosine_betas, ddim, ddpm, linear_betas, sample, spaced

SHAPE = (3, 2, 5, 5)
KINDS = {"noise": "epsilon", "velocity": "v_prediction"}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def draws(n, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def scheduler(kind, schedule, prediction, **options):
    """One of diffusers, with the same betas."""
    diffusers = pytest.importorskip("diffusers")
    common = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": BETAS[schedule]}
    common |= {"prediction_type": KINDS[prediction], "timestep_spacing": "linspace", "clip_sample": False}
    return getattr(diffusers, kind)(**common | options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.script
def test_betas_are_those_of_diffusers(schedule):
    theirs = scheduler("DDPMScheduler", schedule, "noise")
    torch.testing.assert_close(SCHEDULES[schedule](1000).float(), theirs.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(Diffusion(schedule).betas, SCHEDULES[schedule](1000))


def test_the_names_are_those_of_the_configuration():
    assert tuple(SCHEDULES) == dit_sizes.SCHEDULES and tuple(KINDS) == dit_sizes.PREDICTIONS


def test_shorter_schedules_end_in_as_much_noise():
    for betas in (linear_betas, cosine_betas):
        assert torch.cumprod(1 - betas(250), 0)[-1] < 1e-4


def test_spaced_times():
    assert spaced(1000, 4).tolist() == [0, 333, 666, 999] and spaced(7, 7).tolist() == list(range(7))
    assert Diffusion().respaced(4).times.tolist() == [0, 333, 666, 999]
    for kept in (1, 8):
        with pytest.raises(ValueError, match=f"from 2 to 7, got {kept}"):
            spaced(7, kept)


@pytest.mark.parametrize("kept", [None, 13])
def test_respacing_keeps_the_marginals(kept):
    full, some = Diffusion(), Diffusion(kept=kept)
    torch.testing.assert_close(torch.cumprod(1 - some.betas, 0), full.alphas[some.times])


@pytest.mark.parametrize("prediction", KINDS)
def test_the_target_gives_back_what_went_in(prediction):
    diffusion, (clean, noise) = Diffusion("cosine", prediction), draws(2)
    step = torch.tensor([0, 500, 900])
    x = diffusion.noised(clean, noise, step)
    estimate = diffusion.estimate(diffusion.target(clean, noise, step), x, step)
    torch.testing.assert_close(estimate.clean, clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(estimate.noise, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_of_ddpm_are_those_of_diffusers(schedule, prediction, clip):
    pair = {"clip_sample": clip, "variance_type": "fixed_small"}
    theirs = scheduler("DDPMScheduler", schedule, prediction, **pair)
    ours = Diffusion(schedule, prediction, clip=clip).respaced(7)
    theirs.set_timesteps(7)
    assert theirs.timesteps.tolist() == ours.times.flip(0).tolist()
    x, output = draws(2)
    for i in (6, 3, 1, 0):
        expected = theirs.step(output, ours.times[i], x, generator=torch.Generator().manual_seed(i)).prev_sample
        (noise,) = draws(1, seed=i)
        torch.testing.assert_close(ddpm(ours, output, x, torch.full((3,), i), noise), expected, rtol=1e-4, atol=1e-4)


def test_learned_variances_are_those_of_diffusers():
    theirs = scheduler("DDPMScheduler", "linear", "noise", variance_type="learned_range")
    ours = Diffusion(learned_variance=True).respaced(7)
    theirs.set_timesteps(7)
    x, output = draws(1)[0], torch.cat(draws(2, seed=1), 1)
    for i in (6, 3, 1):
        expected = theirs.step(output, ours.times[i], x, generator=torch.Generator().manual_seed(i)).prev_sample
        (noise,) = draws(1, seed=i)
        # The logarithms of variances: theirs lose digits, 1 - alpha being taken in float32.
        torch.testing.assert_close(ddpm(ours, output, x, torch.full((3,), i), noise), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", KINDS)
def test_steps_of_ddim_are_those_of_diffusers(prediction):
    theirs = scheduler("DDIMScheduler", "linear", prediction)
    theirs.set_timesteps(1000)
    x, output = draws(2)
    for i in (999, 500, 1, 0):
        step = torch.full((3,), i)
        expected = theirs.step(output, i, x).prev_sample
        torch.testing.assert_close(
            ddim(Diffusion("linear", prediction), output, x, step, x), expected, rtol=1e-4, atol=1e-4
        )


def test_ddim_goes_straight_between_spaced_times():
    """With the true noise it lands on the sample with that noise at the time before, whatever lies between."""
    diffusion, (clean, noise) = Diffusion().respaced(9), draws(2)
    for i in (8, 4, 1):
        step = torch.full((3,), i)
        back = ddim(diffusion, noise, diffusion.noised(clean, noise, step), step, noise)
        torch.testing.assert_close(back, diffusion.noised(clean, noise, step - 1), rtol=1e-3, atol=1e-3)


def test_the_bound_is_the_divergence_of_two_normal_distributions():
    diffusion, (clean, noise, predicted, between) = Diffusion(learned_variance=True), draws(4)
    step = torch.tensor([999, 400, 1])
    x, output = diffusion.noised(clean, noise, step), torch.cat([predicted, between.tanh()], 1)
    expected = []
    for b, t in enumerate(step.tolist()):
        beta, a, before = (float(v[t]) for v in (diffusion.betas, diffusion.alphas, diffusion.alphas_before))
        variance = beta * (1 - before) / (1 - a)
        share = (between[b].tanh().double() + 1) / 2
        own = (share * math.log(beta) + (1 - share) * math.log(variance)).exp()
        x0 = (x[b].double() - math.sqrt(1 - a) * predicted[b]) / math.sqrt(a)
        means = [
            (math.sqrt(before) * beta * start + math.sqrt(1 - beta) * (1 - before) * x[b].double()) / (1 - a)
            for start in (clean[b].double(), x0)
        ]
        normal = torch.distributions.Normal
        pair = normal(means[0], torch.full_like(own, math.sqrt(variance))), normal(means[1], own.sqrt())
        expected.append(torch.distributions.kl_divergence(*pair).mean() / math.log(2))
    torch.testing.assert_close(
        diffusion.bound(output, clean, x, step).double(), torch.stack(expected), rtol=2e-3, atol=0
    )


def test_the_last_step_counts_the_likelihood_of_the_256_levels():
    diffusion = Diffusion(learned_variance=True)
    levels = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(2, 2, 16, 16).contiguous()
    step, (noise,) = torch.zeros(2, dtype=torch.long), draws(1, levels.shape)
    x, between = diffusion.noised(levels, noise, step), torch.zeros_like(levels)
    bits = diffusion.bound(torch.cat([noise, between], 1), levels, x, step)
    estimate = diffusion.estimate(torch.cat([noise, between], 1), x, step)
    normal = torch.distributions.Normal(estimate.clean.double(), (0.5 * estimate.log_variance.double()).exp())
    below = torch.where(levels < -0.999, 0.0, normal.cdf(levels.double() - 1 / 255))
    above = torch.where(levels > 0.999, 1.0, normal.cdf(levels.double() + 1 / 255))
    expected = -(above - below).log2().flatten(1).mean(1)
    torch.testing.assert_close(bits.double(), expected, rtol=0.05, atol=0.01)  # tanh in place of the error function


def test_losses():
    (clean, noise, predicted), step = draws(3), torch.tensor([3, 500, 999])
    plain = Diffusion(prediction="velocity").losses(predicted, clean, noise, step)
    a = Diffusion().alphas[step].view(3, 1, 1, 1).float()
    assert plain["loss"].item() == pytest.approx(
        float((predicted - a.sqrt() * noise + (1 - a).sqrt() * clean).square().mean())
    )
    learned, between = Diffusion(learned_variance=True), torch.zeros(SHAPE, requires_grad=True)
    predicted.requires_grad_()
    losses = learned.losses(torch.cat([predicted, between], 1), clean, noise, step)
    assert losses["loss"] == losses["mse"] + losses["vlb"]
    (gradient,) = torch.autograd.grad(losses["vlb"], predicted, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any(), "the bound does not move the mean"
    assert torch.autograd.grad(losses["vlb"], between)[0].abs().sum() > 0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_is_its_own_whatever_is_drawn_beside_it(sampler):
    diffusion = Diffusion("cosine", clip=True).respaced(5)

    def drawn(numbers, seed=3):
        return sample(lambda x, t: 0.1 * x, diffusion, Noise(seed, numbers, SHAPE[1:]), sampler=sampler)

    together = drawn(range(4))
    torch.testing.assert_close(torch.cat([drawn([i]) for i in range(4)]), together, rtol=0, atol=0)
    assert not torch.equal(drawn(range(4), seed=4), together)
    assert together.abs().max() <= 1 and len({float(x.sum()) for x in together}) == 4


def test_a_perfect_prediction_draws_the_data():
    """All data is one point: the noise is known from x, and every sampler ends there."""
    point, full = torch.tensor([0.3, -0.7]).view(2, 1, 1).expand(SHAPE[1:]), Diffusion("cosine")

    def predict(x, time):
        a = full.alphas[time].view(-1, 1, 1, 1).float()
        return (x - a.sqrt() * point) / (1 - a).sqrt()

    for sampler in ("ddpm", "ddim"):
        drawn = sample(predict, full.respaced(20), Noise(0, range(3), SHAPE[1:]), sampler=sampler)
        torch.testing.assert_close(drawn, point.expand(SHAPE), rtol=0, atol=1e-3)
