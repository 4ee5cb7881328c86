"""How much of a layer's output is lost, before and after its kept weights are updated, for the report of a run."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.damping import Damp, damping, held_out_error, sampled_rows
from sparsity.reconstruction.equations import squared_error


class Errors(NamedTuple):
    """Relative squared errors of a layer's output, over at most 256 of its rows.

    before, after: of the calibration samples, with the mask alone and with the updated weights. held_out_before,
    held_out_after: of the samples that are held out, with the mask alone and with least squares on the others; NaN
    where none are.
    """

    before: float
    after: float
    held_out_before: float = float("nan")
    held_out_after: float = float("nan")

    def tensor(self) -> Tensor:
        """Return them as a tensor, (4,), as files have them."""
        return torch.tensor(self, dtype=torch.float64)


def layer_errors(plain: Problem, solved: Problem, kept: Tensor, updated: Tensor, damp: Damp) -> Errors:
    """Return the errors of a layer, (out, in), of the wanted output where "dense_hessian" is there, else of its own.

    plain: with the statistics of its inputs. solved: as the reconstruction had it, whose statistics are centred where
    the bias keeps the mean. kept, updated: (out, in).
    """
    rows = sampled_rows(kept)
    known = "dense_hessian" in plain.statistics
    share = plain.dense_share if known else 0.0
    part, centred = (replace(each, weight=each.weight[rows], dense_share=share) for each in (plain, solved))
    before, size = squared_error(part, part.weight * kept[rows], 0.0)
    after, _ = squared_error(centred, updated[rows], 0.0)
    before, after = (error / size if size > 0 else 0.0 for error in (before, after))
    if not {"training", "held_out"} <= plain.statistics.keys():
        return Errors(before, after)
    given = replace(solved, kept=kept)
    held_out_after, held_out_before = held_out_error(given, kept, rows, damping(damp, given))
    return Errors(before, after, held_out_before, held_out_after)
