"""A pruner is an equation: it declares a statistic and turns (weight, statistic) into a score.

Which weights go is decided elsewhere: by the pool (sparsity.allocation.budget), by the pattern (sparsity.pattern) and
by the selection. A new method is a file with a class of about ten lines: a docstring with paper and equation,
`statistic`, `pool` and `score`.
"""

import hashlib
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsity.allocation.budget import POOLS, WITHIN, Sparsity, fraction
from sparsity.errors import UserError
from sparsity.masks import Masks, model_digest
from sparsity.pattern import NM
from sparsity.run.sequential import Done, Progress, by_blocks, defer, device_of
from sparsity.selection import check_finite, keep_within, select
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


class Pruner:
    """Base of all pruners: from a view, and the statistic that the pruner declares, to masks. The model is never
    changed.
    """

    statistic: ClassVar[str | None] = None  # one of sparsity.statistics.passes.PASSES, or its own; None: no data
    pool: ClassVar[str] = "global"  # among which weights scores are compared: sparsity.allocation.budget.POOLS
    draws: ClassVar[bool] = False  # scores depend on the seed where no data is read, too
    cheap: ClassVar[bool] = True  # scores are computed again at each pass; False: computed once and held
    scored: ClassVar[bool] = True  # single weights have scores, which serve all sparsities
    trains: ClassVar[bool] = False  # reads the data anew for each sparsity: no pass serves them all

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2] if cls.__module__.startswith("pruners.") else cls.__name__.lower()

    def score(self, weight: Tensor, statistic: Tensor | None, generator: torch.Generator) -> Tensor:
        """weight (out, in), its statistic, and a generator of its own -> scores (out, in), floating point; the lowest
        go first.
        """
        raise NotImplementedError(f"pruner {self.name!r} does not score single weights")

    def measure(
        self,
        view: PrunableView,
        batches: Iterable[Any] | None,
        *,
        progress: Callable[[Iterable], Iterable] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        generators: Callable[[int], torch.Generator] | None = None,
        rounds: Sequence[int] | None = None,
        scratch: Scratch | None = None,
    ) -> Any:
        """The declared statistic, name -> tensor, from one pass over the batches; none are read when none is declared.

        progress: wraps the batches, as tqdm does. reduce: sums a tensor over ranks, each of which reads its own
        batches. generators: number of a batch -> the generator of what the loss draws there. rounds: for each round of
        batches that belong together, how many of them come here; for pruners that tell one round from another.
        scratch: where a statistic that is too large for memory is kept; for pruners that have such ones.
        """
        if self.statistic is None:
            return {}
        if batches is None:
            raise UserError(f"pruner {self.name!r} needs calibration data")
        batches = progress(batches) if progress else batches
        return collect(view, self.statistic, batches, reduce=reduce, generators=generators)

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
        self,
        view: PrunableView,
        statistics: Mapping[str, Tensor],
        sparsities: Sequence[Sparsity] | None,
        *,
        pattern: NM | None = None,
        pool: str | None = None,
        seed: int = 42,
        again: Callable[..., dict[str, Tensor]] | None = None,
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """(sparsity, masks) for each sparsity, or once for a pattern. statistics: from `measure`.

        again: epoch (1, 2, ...) -> the statistics of the model as it is then, on fresh batches; for iterative pruners.
        Epoch 0 is that of `statistics`; keyword arguments go to `measure`.
        """
        pool = self._check(sparsities, pattern, pool)
        provenance = self._provenance(view, seed)

        def scores(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
            return self.scores(view, statistics, seed=seed, names=names)

        if pattern:
            kept, dense = _follow(pattern, scores(list(view.weights)))
            provenance |= {"pattern": str(pattern), "sparsity": str(pattern.sparsity), "dense_layers": dense}
            yield pattern.sparsity, as_masks(view, kept, provenance)
            return
        if not self.cheap:
            held = dict(scores(list(view.weights)))
            scores = lambda names: ((name, held[name]) for name in names)  # noqa: E731
        for sparsity, kept in zip(sparsities, select(view, scores, pool, sparsities), strict=True):
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
        progress: Callable[[Iterable], Iterable] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """`measure`, then `masks`: (sparsity, masks) for each sparsity (fractions); one pass over the data serves them
        all.

        A pattern replaces pool and sparsities, which must then be None or empty. Raises UserError for options that
        cannot be, before any data is read.
        """
        self.preflight(view, sparsities, pattern=pattern, pool=pool)
        statistics = self.measure(view, batches, progress=progress, reduce=reduce)
        yield from self.masks(view, statistics, sparsities, pattern=pattern, pool=pool, seed=seed)

    def preflight(
        self,
        view: PrunableView,
        sparsities: Sequence[Sparsity] | None,
        *,
        pattern: NM | None = None,
        pool: str | None = None,
        rounds: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Raises UserError for what cannot be, before any data is read.

        rounds: of `measure`. folder: where a statistic that is too large for memory would be kept.
        """
        self._check(sparsities, pattern, pool)

    def _check(self, sparsities: Sequence[Sparsity] | None, pattern: NM | None, pool: str | None) -> str:
        """The pool, when the options go together."""
        if pattern and (sparsities or pool):
            raise UserError(
                f"the pattern {pattern} decides how many weights go and where: give no sparsity and no pool"
            )
        if not pattern and not sparsities:
            raise UserError("give at least one sparsity, or a pattern")
        if pool is not None and pool not in POOLS:
            raise UserError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        for sparsity in sparsities or ():
            fraction(sparsity)
        return pool or self.pool

    def _provenance(self, view: PrunableView, seed: int) -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        return {"pruner": self.name, "seed": seed, "model": model_digest(view), "versions": versions}


MODES = ("dense", "sequential")


class LayerWise(Pruner):
    """Base of pruners that prune each layer by itself, from statistics of its inputs.

    calibration_mode: "dense": the inputs are those of the dense model, and one pass serves all layers and sparsities.
    "sequential": block by block, each on the outputs of the already pruned blocks before it; the data is read anew for
    each block and sparsity. Default: the method's own, `mode`. offload: statistics are kept in the processor's memory,
    and come to a layer's device when it is pruned.
    """

    mode: str
    updates = False  # the weights that are kept change, see `reconstruct`

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
        self,
        view,
        batches,
        *,
        progress=None,
        reduce=None,
        generators=None,
        rounds=None,
        scratch=None,
        names: Sequence[str] | None = None,
    ):
        """As any pruner's; in "sequential" mode for weights of these names alone, and without names nothing is read."""
        if batches is None:
            raise UserError(f"pruner {self.name!r} needs calibration data")
        if self.mode == "sequential" and names is None:
            return defer(view, scratch, reduce)
        batches, where = progress(batches) if progress else batches, {"names": names, "offload": self.offload}
        return collect(view, self.statistic, batches, reduce=reduce, **where)

    def masks(self, view, statistics, sparsities, *, pattern=None, pool=None, seed=42, again=None):
        chosen = self._check(sparsities, pattern, pool)
        sequential = self.mode == "sequential"
        if not sequential and not self.updates:
            yield from super().masks(view, statistics, sparsities, pattern=pattern, pool=pool, seed=seed)
            return
        if sequential and again is None:
            raise UserError(f"{self.name} reads the batches anew for each block")
        facts: dict[str, Any] = {"pool": chosen}
        if pattern:
            facts = {"pattern": str(pattern), "dense_layers": _stay_dense(view, pattern)}
        kept_files = []
        for target in [pattern.sparsity] if pattern else sparsities:
            record = self._provenance(view, seed) | facts | {"sparsity": str(target)}
            prune = partial(self._prune_layer, view, sparsity=target, pattern=pattern, pool=chosen)
            if sequential:
                label = str(pattern or target).replace(":", "of").replace("/", "over")
                kept_files.append(Progress(statistics, label, record, device_of(view)))
                done = by_blocks(view, partial(again, 0), prune, kept_files[-1])
            else:
                done = {n: Done(*prune(n, weight.matrix(), statistics[n])) for n, weight in view.weights.items()}
            updated = {name: what.updated for name, what in done.items() if what.updated is not None}
            yield target, as_masks(view, {name: what.kept for name, what in done.items()}, record, updated)
        for progress in kept_files:
            progress.forget()

    def _prune_layer(
        self,
        view: PrunableView,
        name: str,
        weight: Tensor,
        statistic: Tensor,
        *,
        sparsity: Sparsity,
        pattern: NM | None,
        pool: str,
    ) -> tuple[Tensor, Tensor | None]:
        """What is kept of a layer, and what it becomes."""
        if pattern and not pattern.fits(weight.shape[1]):
            return torch.ones_like(weight, dtype=torch.bool), weight.clone() if self.updates else None
        if self.updates:
            return self.reconstruct(name, weight, statistic, None if pattern else sparsity, pattern)
        ((_, score),) = self.scores(view, {name: statistic}, names=[name])
        check_finite(name, score)
        return (pattern.keep(score) if pattern else keep_within(name, score, pool, sparsity)), None

    def prune(self, view, batches, sparsities, *, pattern=None, pool=None, seed=42, progress=None, reduce=None):
        """As any pruner's; in "sequential" mode the batches are read for each block: a list, or a loader that knows its
        length.
        """
        self.preflight(view, sparsities, pattern=pattern, pool=pool)
        if self.mode == "sequential" and batches is not None and not isinstance(batches, Sized):
            raise UserError(f"{self.name} reads the batches anew for each block: give a list, or a sized loader")
        reading = {"progress": progress, "reduce": reduce}

        def again(_: int, *, names: Sequence[str]) -> dict[str, Tensor]:
            return self.measure(view, batches, names=names, **reading)

        statistics = self.measure(view, batches, **reading)
        yield from self.masks(view, statistics, sparsities, pattern=pattern, pool=pool, seed=seed, again=again)

    def _check(self, sparsities, pattern, pool):
        if self.updates and pool not in (None, self.pool):
            raise UserError(f"{self.name} with updated weights chooses them block by block: leave pool {pool!r} out")
        if self.mode == "sequential" and pool not in (None, *WITHIN):
            raise UserError(
                f"pool {pool!r} compares weights of several layers, which sequential calibration prunes one after the"
                f" other: take {', '.join(WITHIN)}, or calibration_mode dense"
            )
        return super()._check(sparsities, pattern, pool)

    def _provenance(self, view, seed):
        return super()._provenance(view, seed) | {"calibration_mode": self.mode}


def _generator(seed: int, name: str) -> torch.Generator:
    """One stream of random numbers for each layer, that depends on nothing but the seed and the layer's name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _follow(pattern: NM, scores: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], list[str]]:
    """N:M masks, and the names of the layers that stay dense because M does not divide their inputs."""
    kept, dense = {}, []
    for name, score in scores:
        check_finite(name, score)
        if pattern.fits(score.shape[1]):
            kept[name] = pattern.keep(score)
        else:
            kept[name] = torch.ones_like(score, dtype=torch.bool)
            dense.append(name)
    _report_dense(pattern, dense)
    return kept, dense


def _stay_dense(view: PrunableView, pattern: NM) -> list[str]:
    """The layers whose inputs M does not divide, which are reported."""
    dense = [name for name, weight in view.weights.items() if not pattern.fits(weight.shape[1])]
    _report_dense(pattern, dense)
    return dense


def _report_dense(pattern: NM, dense: Sequence[str]) -> None:
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
    return Masks(stored, provenance, {name: weight.aliases for name, weight in view.weights.items()}, updated)
