"""Copies that follow the weights move once a step of the optimizer, however many batches the step has."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from engine.training.fit import Run, fit
from engine.training.optimizer import adamw, after_each_step, muon
from models.blip import model as blip
from models.blip import retrieval as blip_retrieval
from models.parts.pretraining import Denoising, Sources
from tests.conftest import BLIP_CONFIG, SMALL_BLIP

STEPS = 3
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "adamw": lambda model: adamw(model, lr=0.1, weight_decay=0.01, betas=(0.9, 0.98)),
    "muon": lambda model: muon(model, lr=0.1, matrix_lr=0.05, weight_decay=0.01, betas=(0.9, 0.98)),
}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def losses(self, batch):
        return {"loss": self.layer(batch["x"]).square().mean()}


def train(folder, model, batches, make=OPTIMIZERS["sgd"], **options):
    """`STEPS` steps; the optimizer tells the model, as in the scripts."""
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = make(model)
    after_each_step(optimizer, model.on_step)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    fit(Run(fabric, wrapped, wrapped_optimizer, lambda _: 1.0, STEPS, folder, {}, seed=0, **options), batches, 0)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_moving_average_is_the_same_with_one_batch_a_step_and_with_two(tmp_path, make):
    data = torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(0))
    averages = []
    for accumulate in (1, 2):
        torch.manual_seed(1)
        around = Denoising(Regression(), decay=0.5)
        batches = [{"x": part} for step in data for part in step.chunk(accumulate)]
        train(tmp_path / str(accumulate), around, batches, make, accumulate=accumulate)
        assert int(around.steps) == STEPS
        averages.append(around.result.state_dict())
    torch.testing.assert_close(averages[0], averages[1])
    assert not torch.equal(averages[0]["layer.weight"], around.model.layer.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_momentum_copies_follow_each_step_and_nothing_else(tmp_path, blip_batches, accumulate):
    """m = 0.995 m + 0.005 w, with the weights w as each step leaves them."""
    model = blip_retrieval.build(BLIP_CONFIG, SMALL_BLIP / "state_dict.safetensors")
    model.on_pruned()
    name = "vision_proj.weight"
    expected, weights = model.get_parameter(name).detach().clone(), []
    move = model.update_momentum
    model.update_momentum = lambda: weights.append(model.get_parameter(name).detach().clone()) or move()
    train(tmp_path, model, [{"batch": batch} for batch in blip_batches["general"]] * 3, accumulate=accumulate)
    assert len(weights) == STEPS
    for weight in weights:
        expected = 0.995 * expected + 0.005 * weight
    torch.testing.assert_close(model.get_parameter("vision_proj_m.weight"), expected)
    assert int(model.ptr_queue) == 4 * STEPS * accumulate % 32  # features are queued with every batch


def test_sources_of_one_step_move_the_copies_once(tmp_path, small_blip, blip_batches):
    moved = []
    small_blip.update_momentum = lambda: moved.append(1)
    sources = {"general": blip_batches["general"][0], "region": blip_batches["region"][0]}
    train(tmp_path, Sources(small_blip), [{"sources": sources}] * STEPS)
    assert len(moved) == STEPS


def test_calibration_moves_no_copy(small_blip, blip_batches):
    before = {name: tensor.clone() for name, tensor in small_blip.state_dict().items() if "_m." in name}
    with torch.no_grad():
        for name, parameter in small_blip.named_parameters():
            if "_m." not in name:
                parameter.add_(0.01)  # the copies would follow
    view = blip.prunable_view(small_blip)
    for batch in blip_batches["general"]:
        view.loss(batch).backward()
        view.forward(batch)
    assert before and all(torch.equal(small_blip.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_step_that_the_loss_scale_skips_moves_nothing():
    model, moved = nn.Linear(2, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    after_each_step(optimizer, lambda: moved.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (torch.inf, 1.0):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert moved == [1]
