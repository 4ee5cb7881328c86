"""Samples that are held out."""

import pytest
import torch

from sparsity.statistics.hessian import triangle
from sparsity.statistics.passes import collect
from sparsity.statistics.streams import held_out
from tests.toys import layers, view_of


@pytest.mark.parametrize("samples", [1, 7, 8, 10, 33])
def test_a_tenth_is_held_out_over_ten_batches_and_each_place_once(samples):
    found = torch.stack([held_out(torch.Size((samples, 5, 3)), number, torch.device("cpu")) for number in range(10)])
    assert found.shape == (10, samples, 5)
    assert (found.sum(0) == 1).all()
    assert found[0].any(), "one batch is enough to hold a sample out"


def test_whole_samples_are_held_out():
    mask = held_out(torch.Size((20, 5, 3)), 3, torch.device("cpu"))
    assert (mask.all(1) | ~mask.any(1)).all() and mask.any(1).sum() == 2


def test_statistics_of_both_parts_are_those_of_their_samples():
    view = view_of(
        layers((4, 6)), forward=lambda batch: view.model["a"](batch["x"]), valid_tokens=lambda _, b: b["valid"]
    )
    generator, rows = torch.Generator().manual_seed(0), {True: [], False: []}
    batches = []
    for number in range(4):
        x = torch.randn(8, 5, 6, generator=generator)
        valid = torch.rand(8, 5, generator=generator) < 0.7
        batches.append({"x": x, "valid": valid})
        apart = held_out(x.shape, number, x.device)
        for part in (True, False):
            rows[part].append(x[valid & (apart == part)])
    wanted = ["training", "held_out", "training_means", "held_out_means", "hessian", "input_means"]
    found = collect(view, wanted, batches)
    for part, name in ((True, "held_out"), (False, "training")):
        X = torch.cat(rows[part]).double()
        torch.testing.assert_close(
            triangle(found[name]["a.weight"], 6), (2 * X.t() @ X / len(X)).triu(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(found[f"{name}_means"]["a.weight"], X.mean(0), rtol=1e-9, atol=1e-12)
    whole = torch.cat([row for both in rows.values() for row in both]).double()
    torch.testing.assert_close(found["input_means"]["a.weight"], whole.mean(0), rtol=1e-9, atol=1e-12)
    alone = collect(view, "hessian", batches)
    assert torch.equal(found["hessian"]["a.weight"], alone["a.weight"])
