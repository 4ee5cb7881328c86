"""The distillation loss against formulas written out, and that a batch's is the mean of its halves'."""

import math

import pytest
import torch
from torch import Tensor

from engine.sparse_training.distillation import TEMPERATURE, distillation
from sparsity.view import Output


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def term(kind: str, student: Tensor, teacher: Tensor, real: Tensor | None = None) -> float:
    losses = distillation({"x": Output(kind, student, real)}, {"x": Output(kind, teacher, real)})
    assert losses["loss"] == losses["x"]
    return float(losses["x"])


def naive_divergence(student: Tensor, teacher: Tensor) -> float:
    """T^2 times the sum of p log(p / q), of one sample's logits (classes,)."""
    p, q = ((logits / TEMPERATURE).double().softmax(0).tolist() for logits in (teacher, student))
    return TEMPERATURE**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_logits_of_classes():
    student, teacher = normal(4, 5), normal(4, 5, seed=1)
    expected = sum(naive_divergence(s, t) for s, t in zip(student, teacher, strict=True)) / 4
    assert term("logits", student, teacher) == pytest.approx(expected, rel=1e-5)


def test_a_hand_computed_divergence():
    """Softmax at T = 2 of (2 ln 3, 0) is (3/4, 1/4), of (0, 0) is (1/2, 1/2)."""
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert term("logits", student, teacher) == pytest.approx(expected, rel=1e-5)


def test_logits_of_tokens_are_averaged_over_real_ones_of_each_sample():
    student, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    real = torch.tensor([[True, True, True], [True, False, False]])
    each = [[naive_divergence(student[b, i], teacher[b, i]) for i in range(3)] for b in range(2)]
    expected = (sum(each[0]) / 3 + each[1][0]) / 2
    assert term("logits", student, teacher, real) == pytest.approx(expected, rel=1e-5)


def test_the_direction_of_embeddings():
    student, teacher = torch.tensor([[1.0, 0.0], [3.0, 3.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    assert term("embedding", student, teacher) == pytest.approx((0 + 1 - math.sqrt(0.5)) / 2, rel=1e-6)


def test_states_are_relative():
    student, teacher = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    expected = sum(float((s - t).square().sum() / t.square().sum()) for s, t in zip(student, teacher, strict=True)) / 3
    assert term("states", student, teacher) == pytest.approx(expected, rel=1e-5)
    assert term("states", 10 * student, 10 * teacher) == pytest.approx(expected, rel=1e-5)
    assert term("states", student[:, 0], torch.zeros(3, 6)) < math.inf


@pytest.mark.parametrize("kind", ["logits", "embedding", "states"])
def test_what_stands_at_padding_does_not_count(kind):
    student, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    real = torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(real[..., None], student, torch.nan)
    assert term(kind, other, teacher, real) == term(kind, student, teacher, real)


@pytest.mark.parametrize("kind", ["logits", "embedding", "states"])
def test_a_copy_has_no_loss_and_a_batch_the_mean_of_its_halves(kind):
    student, teacher = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    real = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) < 0.6
    assert term(kind, student, student.clone(), real) == pytest.approx(0, abs=1e-6)
    halves = [term(kind, student[i : i + 2], teacher[i : i + 2], real[i : i + 2]) for i in (0, 2)]
    assert term(kind, student, teacher, real) == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_the_loss_is_the_sum_and_the_teacher_has_no_gradient():
    student, teacher = normal(4, 5).requires_grad_(), normal(4, 5, seed=1).requires_grad_()
    own = {"a": Output("logits", student), "b": Output("states", student)}
    losses = distillation(own, {"a": Output("logits", teacher), "b": Output("states", teacher)})
    assert losses["loss"] == losses["a"] + losses["b"]
    losses["loss"].backward()
    assert student.grad is not None and teacher.grad is None


def test_half_precision_is_widened():
    student, teacher = normal(4, 5).bfloat16(), normal(4, 5, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation({"x": Output("logits", student)}, {"x": Output("logits", teacher)})["x"]
    assert found.dtype == torch.float32
    assert float(found) == term("logits", student.float(), teacher.float())
