"""Base of the pruners that prune each layer by itself, from statistics of its inputs."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruners.base import Again, Measured, Pruner, as_masks, by_name, dense_layers, warn_dense
from sparsity.allocation.budget import WITHIN, Sparsity
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.run.request import PLAIN_PASS, CalibrationPass, Request
from sparsity.run.sequential import Deferred, Done, Progress, by_blocks, defer, device_of
from sparsity.selection import check_finite, keep_within
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView

MODES = ("dense", "sequential")


class LayerWise(Pruner):
    """Base of pruners that prune each layer by itself, from statistics of its inputs.

    calibration_mode: "dense": the inputs are those of the dense model, and one pass serves all layers and sparsities.
    "sequential": block by block, each on the outputs of the already pruned blocks before it; the data is read anew for
    each block and sparsity. Default: the method's own, `mode`. offload: statistics are kept in the processor's memory,
    and come to a layer's device when it is pruned.
    """

    mode: str
    updates: bool = False  # the weights that are kept change, see `reconstruct`

    def __init__(self, calibration_mode: str | None = None, offload: bool = False):
        if calibration_mode not in (None, *MODES):
            raise UserError(f"calibration_mode must be one of {', '.join(MODES)}, got {calibration_mode!r}")
        self.mode, self.offload = calibration_mode or self.mode, offload
        self.scored = self.mode == "dense"

    def reconstruct(
        self, name: str, weight: Tensor, statistic: Tensor, sparsity: Sparsity | None, pattern: NM | None
    ) -> tuple[Tensor, Tensor]:
        """Kept, bool, and updated weights, (out, in) both, of a method that updates."""
        raise NotImplementedError

    def measure(
        self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass = PLAIN_PASS
    ) -> Measured:
        """As any pruner's; in "sequential" mode of the weights that the pass names, and nothing is read without."""
        if batches is None or self.statistic is None:
            raise UserError(f"pruner {self.name!r} needs calibration data")
        if self.mode == "sequential" and reading.names is None:
            return defer(view, reading.scratch, reading.reduce)
        over, names = reading.over(batches), reading.names
        return collect(view, self.statistic, over, reduce=reading.reduce, names=names, offload=self.offload)

    def masks(
        self, view: PrunableView, statistics: Measured, request: Request, again: Again | None = None
    ) -> Iterator[tuple[Sparsity, Masks]]:
        pool, pattern = self._check(request), request.pattern
        if self.mode == "dense" and not self.updates:
            yield from super().masks(view, statistics, request)
            return
        facts: dict[str, Any] = {"pool": pool}
        if pattern:
            facts = {"pattern": str(pattern), "dense_layers": dense_layers(view, pattern)}
            warn_dense(pattern, facts["dense_layers"])
        progress: list[Progress] = []
        for one in request.each():
            record = self._provenance(view, one.seed) | facts | {"sparsity": str(one.target)}
            prune = partial(self._prune_layer, view, one, pool)
            if self.mode == "sequential":
                if again is None:
                    raise UserError(f"{self.name} reads the batches anew for each block")
                assert isinstance(statistics, Deferred), "`measure` defers in this mode"
                label = str(pattern or one.target).replace(":", "of").replace("/", "over")
                progress.append(Progress(statistics, label, record, device_of(view)))
                done = by_blocks(view, lambda names: by_name(again(0, names=names)), prune, progress[-1])
            else:
                found = by_name(statistics)
                done = {n: Done(*prune(n, weight.matrix(), found[n])) for n, weight in view.weights.items()}
            updated = {name: what.updated for name, what in done.items() if what.updated is not None}
            yield one.target, as_masks(view, {name: what.kept for name, what in done.items()}, record, updated)
        for files in progress:
            files.forget()

    def _prune_layer(
        self, view: PrunableView, request: Request, pool: str, name: str, weight: Tensor, statistic: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What is kept of a layer, and what it becomes. request: for one set of masks."""
        pattern = request.pattern
        if pattern and not pattern.fits(weight.shape[1]):
            return torch.ones_like(weight, dtype=torch.bool), weight.clone() if self.updates else None
        if self.updates:
            return self.reconstruct(name, weight, statistic, None if pattern else request.target, pattern)
        ((_, score),) = self.scores(view, {name: statistic}, names=[name])
        check_finite(name, score)
        return (pattern.keep(score) if pattern else keep_within(name, score, pool, request.target)), None

    def _prune(
        self, view: PrunableView, batches: Iterable[Any] | None, request: Request, reading: CalibrationPass
    ) -> Iterator[tuple[Sparsity, Masks]]:
        again = self._rereading(view, batches, reading, "block") if self.mode == "sequential" else None
        yield from self.masks(view, self.measure(view, batches, reading), request, again)

    def _check(self, request: Request) -> str:
        if self.updates and request.pool not in (None, self.pool):
            raise UserError(
                f"{self.name} with updated weights chooses them block by block: leave pool {request.pool!r} out"
            )
        if self.mode == "sequential" and request.pool not in (None, *WITHIN):
            raise UserError(
                f"pool {request.pool!r} compares weights of several layers, which sequential calibration prunes one"
                f" after the other: take {', '.join(WITHIN)}, or calibration_mode dense"
            )
        return super()._check(request)

    def _provenance(self, view: PrunableView, seed: int) -> dict[str, Any]:
        return super()._provenance(view, seed) | {"calibration_mode": self.mode}
