import torch

from pruners.base import Pruner


class SNIP(Pruner):
    """SNIP, arXiv 1810.02340, eq. 6: score = abs(mean gradient of the loss * w), divided by its sum over the model."""

    statistic = "mean_gradient"

    def measure(self, view, batches, **options):
        gradients = super().measure(view, batches, **options)
        scores = self.scores(view, gradients)
        total = sum(float(score.sum(dtype=torch.float64)) for _, score in scores)
        return {name: gradient.div_(total) for name, gradient in gradients.items()} if total else gradients

    def score(self, weight, statistic, generator):
        return (weight * statistic).abs_()
