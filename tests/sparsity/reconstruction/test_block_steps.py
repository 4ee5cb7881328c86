"""Training of one block: its gradient is autograd's, held-out samples decide, and zeros stay zero."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.reconstruction import block_steps
from sparsity.reconstruction.block_steps import check_steps, train
from sparsity.replay.uses import Use
from sparsity.statistics.streams import held_out

WIDTH, TOKENS, SAMPLES = 6, 3, 5


def block_of(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)
    return nn.Sequential(*layers).to(dtype).requires_grad_(False)


def uses_of(block: nn.Module, dense: nn.Module, count: int, real: Tensor | None = None) -> list[tuple[int, Use]]:
    generator = torch.Generator().manual_seed(2)
    found, dtype = [], next(block.parameters()).dtype
    for number in range(count):
        x = torch.randn(SAMPLES, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        use = Use(lambda x=x: [block(x)], lambda x=x: [dense(x)], [real], [x.shape])
        found.append((number, use))
    return found


def pruned(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Sequential, dict[str, Tensor]]:
    """A block of which half of the weights are zero, the dense one, and what is kept."""
    block, dense, kept = block_of(seed, dtype), block_of(seed, dtype), {}
    for key in ("1.weight", "3.weight"):
        weight = block.get_parameter(key)
        kept[key] = weight.abs() > weight.abs().median()
        weight.data *= kept[key]
    return block, dense, kept


def error_of(uses: Sequence[tuple[int, Use]], real: Tensor | None = None, held: bool = True) -> Tensor:
    """|f - y|^2 / |y|^2 over the samples that are held out, or over the others, by a formula of our own."""
    error, power = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for number, use in uses:
        ((output,), (wanted,)) = use.run(), use.wanted()
        rows = held_out(output.shape, number, output.device) == held
        rows = rows if real is None else rows & real
        error, power = error + (output - wanted)[rows].square().sum(), power + wanted[rows].square().sum()
    return error / power


@pytest.mark.parametrize("padded", [False, True])
def test_the_gradient_is_that_of_autograd(padded):
    real = torch.rand(SAMPLES, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3 if padded else None
    block, dense, _ = pruned()
    uses, parameters = uses_of(block, dense, 3, real), list(block.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = block_steps._gradients(uses, parameters, None)
    expected = torch.autograd.grad(error_of(uses, real, held=False), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_held_out_samples_decide_and_zeros_stay():
    block, dense, kept = pruned()
    parameters, uses = dict(block.named_parameters()), uses_of(block, dense, 10)
    start = float(error_of(uses))
    found = train(uses, parameters, kept, 40, rounds=10)
    assert found.values is not None and found.values.keys() == parameters.keys()
    assert found.before == pytest.approx(start, rel=1e-12) and found.after < 0.7 * start
    assert not any(parameter.requires_grad for parameter in block.parameters())
    for key, value in found.values.items():
        parameters[key].data.copy_(value)
        assert key not in kept or (not value[~kept[key]].any() and value[kept[key]].all())
    assert float(error_of(uses)) == pytest.approx(found.after, rel=1e-12)


def test_the_start_is_the_result_where_no_step_is_better(monkeypatch):
    monkeypatch.setattr(block_steps, "RATE", 1e3)
    block, dense, kept = pruned()
    found = train(uses_of(block, dense, 10), dict(block.named_parameters()), kept, 5, rounds=10)
    assert found.values is None and found.after == found.before and found.step == 0


def test_what_is_held_out_is_never_trained_on():
    """Samples that are held out have other dense outputs: what is trained does not depend on them."""
    found = []
    for moved in (0.0, 5.0):
        block, dense, kept = pruned()
        uses = []
        for number, use in uses_of(block, dense, 10):
            shift = moved * held_out(use.shapes[0], number, torch.device("cpu"))[..., None]
            wanted = [use.wanted()[0] + shift]
            uses.append((number, Use(use.run, lambda wanted=wanted: wanted, use.real, use.shapes)))
        parameters = dict(block.named_parameters())
        train(uses, parameters, kept, 7, rounds=10)
        found.append({key: parameter.clone() for key, parameter in parameters.items()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_without_held_out_samples_nothing_changes():
    block, dense, kept = pruned()
    uses = [(number + 1, use) for number, use in uses_of(block, dense, 2)]  # of 5 samples, batch 2 holds out none
    uses = [(number, use) for number, use in uses if not held_out(use.shapes[0], number, torch.device("cpu")).any()]
    found = train(uses, dict(block.named_parameters()), kept, 4, rounds=3)
    assert found.values is None


def test_parameters_in_half_precision_have_masters():
    """Steps that are smaller than the rounding of a bfloat16 number add up."""
    block, dense, kept = pruned(dtype=torch.bfloat16)
    found = train(uses_of(block, dense, 10), dict(block.named_parameters()), kept, 60, rounds=10)
    assert found.values is not None and found.after < 0.7 * found.before
    assert {value.dtype for value in found.values.values()} == {torch.bfloat16}


def test_what_cannot_be_is_refused():
    for steps, window, told in ((-1, "block", "whole number"), (1.5, "block", "whole number"), (3, "heads", "one of")):
        with pytest.raises(UserError, match=told):
            check_steps(steps, window, ("mlp", "block"))  # pyright: ignore[reportArgumentType]
