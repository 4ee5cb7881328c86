"""A new score, allocation or reconstruction is a short class, used by what it is."""

from pruners.base import Pruner
from sparsity.allocation.base import Allocation, Contest
from sparsity.allocation.budget import budget
from sparsity.reconstruction.base import Reconstruction, check_mask, check_problem
from sparsity.statistics.hessian import triangle
from tests.sparsity.run.test_engine import SPARSITY, Net, batches_of, inputs_of, lost, once, view_of


class Shifted(Pruner):
    """score = abs(w_ij) + mean of the inputs of column j, within layers."""

    statistic = "input_means"
    allocation = "layer"

    def score(self, weight, statistic, generator):
        return weight.abs().double() + statistic


class FirstLayers(Allocation):
    """The first layers lose all that they may, but for a share of each, until the budget is met."""

    local = True

    def __init__(self, keep=0.1):
        self.keep = keep

    def contests(self, part, sparsities):
        return [Contest([name], [self._counts(part, s)[name] for s in sparsities]) for name in part.names]

    def _counts(self, part, sparsity):
        left, counts = budget(sparsity, part.numel), {}
        for name, size in zip(part.names, part.sizes, strict=True):
            counts[name] = min(left, size - int(self.keep * size))
            left -= counts[name]
        return counts


class Rescaled(Reconstruction):
    """The kept weights of each row times the factor that brings its output nearest to the dense one's."""

    calibration = "dense"

    def solve(self, problem):
        check_problem(self, problem)
        kept = check_mask(problem)
        H = triangle(problem.statistics["hessian"], problem.weight.shape[1])
        H = H + H.triu(1).t()
        dense, sparse = problem.weight.double(), problem.weight.double() * kept
        of_sparse = sparse @ H
        scale = (of_sparse * dense).sum(1) / (of_sparse * sparse).sum(1).clamp_min(1e-30)
        return kept, (scale[:, None] * sparse).to(problem.weight.dtype)


def test_new_parts_are_used_by_what_they_are():
    view = view_of(Net().eval())
    data, rows = batches_of(), inputs_of(view, batches_of())
    plain = once(Shifted, view, data)
    for name, weight in view.weights.items():
        score = weight.matrix().abs().double() + rows[name].mean(0)
        order, count = score.flatten().argsort(stable=True), budget(SPARSITY, weight.numel)
        assert not plain[name].flatten()[order[:count]].any() and plain[name].flatten()[order[count:]].all()
    shared = once(Shifted, view, data, allocation=FirstLayers(keep=0.2))
    sizes = {name: weight.numel for name, weight in view.weights.items()}
    assert lost(shared) == budget(SPARSITY, view.numel) and shared.provenance["allocation"] == FirstLayers.name
    assert lost(shared, ["embed.weight"]) == sizes["embed.weight"] - int(0.2 * sizes["embed.weight"])
    for options in ({}, {"allocation": FirstLayers(), "calibration_mode": "sequential"}):
        masks = once(Shifted, view, data, reconstruct=Rescaled(), **options)
        assert masks.provenance["reconstruction"] == Rescaled.name and set(masks.weights) == set(view.weights)
    masks = once(Shifted, view, data, reconstruct=Rescaled())
    assert masks.digest() == plain.digest()
    for name, weight in view.weights.items():
        dense, sparse, scaled = (
            w.double() for w in (weight.matrix(), weight.matrix() * masks[name], masks.weights[name])
        )
        errors = [(rows[name] @ (dense - each).t()).square().sum(0) for each in (scaled, sparse)]
        assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and errors[0].sum() < errors[1].sum()
