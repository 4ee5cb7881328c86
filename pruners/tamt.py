import torch
from torch import Tensor

from pruners.base import Pruner
from sparsity.learned.scores import LearnedScores


class TAMT(Pruner):
    """Task-agnostic mask training, arXiv 2204.11218: a score of each weight is trained on the pretraining loss of the
    model under the mask of the highest abs(score), straight-through; the weights are frozen. Each sparsity is trained
    for, from the dense model; a step is a round of batches, and `num_batches` the number of steps.

    mask_lr: AdamW's rate at the first step, from which it goes linearly to 0. mask_decay: its weight decay.
    """

    def __init__(self, mask_lr: float = 5e-5, mask_decay: float = 0.01):
        self.mask_lr, self.mask_decay = mask_lr, mask_decay
        self.statistic = LearnedScores(mask_lr, mask_decay)

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return statistic.abs()
