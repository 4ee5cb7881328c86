"""A pruner is an equation: it declares a statistic and turns (weight, statistic) into a score.

Which weights go is decided elsewhere: by the pool (sparsity.allocation.budget), by the pattern (sparsity.pattern) and
by the selection. A new method is a file with a class of about ten lines: a docstring with paper and equation,
`statistic`, `pool` and `score`.
"""

import hashlib
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparsity.allocation.budget import POOLS, Sparsity, fraction
from sparsity.errors import UserError
from sparsity.masks import Masks, model_digest
from sparsity.pattern import NM
from sparsity.run.request import PLAIN_PASS, CalibrationPass, Request
from sparsity.run.sequential import Deferred
from sparsity.selection import check_finite, select
from sparsity.statistics.gradient_rows import Rows
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

Measured = Mapping[str, Tensor] | Rows | Deferred  # name -> statistic, or what the pruner has in its place


class Again(Protocol):
    """Measure once more: the statistics of the model as it is then, on the batches of an epoch (0, 1, ...). Epoch 0 is
    that of the first statistics. names, request: of the `CalibrationPass`.
    """

    def __call__(
        self, epoch: int, *, names: Sequence[str] | None = None, request: Request | None = None
    ) -> Measured: ...


class Pruner:
    """Base of all pruners: from a view, and the statistic that the pruner declares, to masks. The model is never
    changed.
    """

    name: ClassVar[str]  # on the command line
    statistic: ClassVar[str | None] = None  # one of sparsity.statistics.passes.PASSES, or its own; None: no data
    pool: ClassVar[str] = "global"  # among which weights scores are compared: sparsity.allocation.budget.POOLS
    draws: ClassVar[bool] = False  # scores depend on the seed where no data is read, too
    cheap: ClassVar[bool] = True  # scores are computed again at each pass; False: computed once and held
    scored: bool = True  # single weights have scores, which serve all sparsities
    trains: ClassVar[bool] = False  # reads the data anew for each sparsity: no pass serves them all

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2] if cls.__module__.startswith("pruners.") else cls.__name__.lower()

    def score(self, weight: Tensor, statistic: Any, generator: torch.Generator) -> Tensor:
        """weight (out, in), its statistic (a tensor; None where none is declared), and a generator of its own -> scores
        (out, in), floating point; the lowest go first.
        """
        raise NotImplementedError(f"pruner {self.name!r} does not score single weights")

    def measure(
        self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass = PLAIN_PASS
    ) -> Measured:
        """The declared statistic, name -> tensor, from one pass over the batches; none declared: nothing is read."""
        if self.statistic is None:
            return {}
        if batches is None:
            raise UserError(f"pruner {self.name!r} needs calibration data")
        over = reading.over(batches)
        return collect(view, self.statistic, over, reduce=reading.reduce, generators=reading.generators)

    def scores(
        self,
        view: PrunableView,
        statistics: Mapping[str, Tensor],
        *,
        seed: int = 42,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, score (out, in)) of all weights, or of `names`, one at a time and in order. statistics: from
        `measure`.
        """
        for name in view.weights if names is None else names:
            weight, statistic = view.weights[name].matrix(), statistics.get(name)
            if statistic is not None:
                statistic = statistic.to(weight.device)
            yield name, self.score(weight, statistic, _generator(seed, name))

    def masks(
        self, view: PrunableView, statistics: Measured, request: Request, again: Again | None = None
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """(sparsity, masks) for each sparsity, or once for a pattern. statistics: from `measure`. again: for pruners
        that read the batches more than once.
        """
        pool, found = self._check(request), by_name(statistics)
        provenance = self._provenance(view, request.seed)

        def scores(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
            return self.scores(view, found, seed=request.seed, names=names)

        if request.pattern:
            pattern = request.pattern
            kept = dict(_follow(pattern, scores(list(view.weights))))
            dense = dense_layers(view, pattern)
            warn_dense(pattern, dense)
            provenance |= {"pattern": str(pattern), "sparsity": str(pattern.sparsity), "dense_layers": dense}
            yield pattern.sparsity, as_masks(view, kept, provenance)
            return
        if not self.cheap:
            held = dict(scores(list(view.weights)))
            scores = lambda names: ((name, held[name]) for name in names)  # noqa: E731
        for sparsity, kept in zip(request.sparsities, select(view, scores, pool, request.sparsities), strict=True):
            yield sparsity, as_masks(view, dict(kept), provenance | {"pool": pool, "sparsity": str(sparsity)})

    def prune(
        self,
        view: PrunableView,
        batches: Iterable[Any] | None,
        sparsities: Sequence[Sparsity] | None,
        *,
        pattern: NM | None = None,
        pool: str | None = None,
        seed: int = 42,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """`measure`, then `masks`: (sparsity, masks) for each sparsity (fractions).

        One pass over the data serves them all, but for pruners that read the batches for each block or each sparsity:
        these need a list, or a loader that knows its length. A pattern replaces pool and sparsities, which must then be
        None or empty. Raises UserError for options that cannot be, before any data is read.
        """
        request = Request(sparsities or (), pattern, pool, seed)
        self.preflight(view, request)
        yield from self._prune(view, batches, request, CalibrationPass(progress, reduce))

    def _prune(
        self, view: PrunableView, batches: Iterable[Any] | None, request: Request, reading: CalibrationPass
    ) -> Iterator[tuple[Sparsity, Masks]]:
        yield from self.masks(view, self.measure(view, batches, reading), request)

    def _rereading(
        self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass, each: str
    ) -> Again:
        """Measure on the same batches once more. UserError where they can be read only once."""
        if batches is not None and not isinstance(batches, Sized):
            raise UserError(
                f"{self.name} reads the batches anew for each {each}: give a list, or a loader with a length"
            )

        def again(epoch: int, *, names: Sequence[str] | None = None, request: Request | None = None) -> Measured:
            return self.measure(view, batches, replace(reading, names=names, request=request))

        return again

    def preflight(
        self,
        view: PrunableView,
        request: Request,
        *,
        rounds: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises UserError for what cannot be, before any data is read.

        rounds: of the `CalibrationPass`. folder: where a statistic that is too large for memory would be kept.
        """
        self._check(request)

    def _check(self, request: Request) -> str:
        """The pool, when the options go together."""
        if request.pattern and (request.sparsities or request.pool):
            raise UserError(
                f"the pattern {request.pattern} decides how many weights go and where: give no sparsity and no pool"
            )
        if not request.pattern and not request.sparsities:
            raise UserError("give at least one sparsity, or a pattern")
        if request.pool is not None and request.pool not in POOLS:
            raise UserError(f"pool must be one of {', '.join(POOLS)}, got {request.pool!r}")
        for sparsity in request.sparsities:
            fraction(sparsity)
        return request.pool or self.pool

    def _provenance(self, view: PrunableView, seed: int) -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {"pruner": self.name, "seed": seed, "model": model_digest(view), "versions": versions}


def by_name(measured: Measured) -> Mapping[str, Tensor]:
    """Return what was measured, of a pruner whose statistics are tensors by name."""
    assert isinstance(measured, Mapping), "gradient rows and what is deferred are other pruners'"
    return measured


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers for each layer, that depends on nothing but the seed and the layer's name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _follow(pattern: NM, scores: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """N:M masks; layers whose inputs M does not divide stay dense."""
    for name, score in scores:
        check_finite(name, score)
        fits = pattern.fits(score.shape[1])
        yield name, pattern.keep(score) if fits else torch.ones_like(score, dtype=torch.bool)


def dense_layers(view: PrunableView, pattern: NM) -> list[str]:
    """Return the names of the layers that stay dense because M does not divide their inputs."""
    return [name for name, weight in view.weights.items() if not pattern.fits(weight.shape[1])]


def warn_dense(pattern: NM, dense: Sequence[str]) -> None:
    """Warn of layers that stay dense under a pattern."""
    if dense:
        logger.warning(
            "%d layers stay dense, as %d does not divide their inputs: %s", len(dense), pattern.m, ", ".join(dense)
        )


def as_masks(
    view: PrunableView,
    kept: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Masks from (out, in) tensors: which weights are kept and, where the method has updated them, what they become."""
    stored = {name: weight.as_stored(kept[name]).cpu() for name, weight in view.weights.items()}
    updated = {name: view.weights[name].as_stored(weight).cpu() for name, weight in (weights or {}).items()}
    return Masks(stored, provenance, view.aliases, updated)
