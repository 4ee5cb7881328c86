"""Scores that are learned, arXiv 2204.11218: a mask is trained, and the weights under it stay as they are.

Each weight has a score m. Its mask is 1 where abs(m) is among the highest, and exactly as many weights as asked for are
masked in every step. The gradient passes straight through the choice: that of m is the mask's, times the sign of m. So
a pruned weight is judged too, and comes back when its score grows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity, budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.selection import Named, keep_within, thresholds
from sparsity.statistics.gradients import batch_generator, nothing, only_prunable, summed_gradients, wide
from sparsity.statistics.inputs import untouched
from sparsity.statistics.reading import CalibrationPass, Target
from sparsity.view import PrunableView

# scores(names) -> (name, score (out, in)); it may be called several times. Gives the masks, (name, bool (out, in)).
Choice = Callable[[Callable[[Sequence[str]], Named]], Named]


@dataclass(frozen=True)
class LearnedScores:
    """Scores that are learned for one target, from its layer-wise magnitude mask.

    lr: AdamW's rate at the first step, from which it goes linearly to 0. weight_decay: its weight decay.
    """

    lr: float
    weight_decay: float
    name: str = "learned_scores"

    def collect(self, view: PrunableView, reading: CalibrationPass, target: Target) -> dict[str, Tensor]:
        """Return name -> score (out, in). A step is a round of batches."""
        return learn(
            view,
            start_from_magnitude(view, target.sparsity, target.pattern),
            target.choose,
            reading.over(),
            rounds=reading.rounds_of(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            generators=reading.generators,
            reduce=reading.reduce,
        )


def start_from_magnitude(view: PrunableView, sparsity: Sparsity, pattern: NM | None = None) -> dict[str, Tensor]:
    """The first scores, name -> (out, in): 2 * tau where the layer-wise magnitude mask keeps the weight, else 0.

    tau is the global magnitude threshold at this sparsity. Raises UserError where that is 0: no score would tell a
    weight that is kept from one that is not.
    """

    def magnitudes(names: Sequence[str] = tuple(view.weights)) -> Named:
        return ((name, view.weights[name].matrix().abs()) for name in names)

    pruned = budget(sparsity, view.numel)
    (threshold,) = thresholds(magnitudes, [pruned])
    if pruned and threshold.value == 0:
        raise UserError(
            f"scores are learned from magnitudes, and {pruned} or more of the {view.numel} weights are 0 already: ask "
            "for a higher sparsity, or give weights that are not pruned"
        )
    tau = threshold.value if pruned else 0.0
    masks = ((name, _keep(name, score, sparsity, pattern)) for name, score in magnitudes())
    # Half precision would lose the steps of the optimizer.
    return {name: kept.to(wide(view.weights[name].parameter.dtype)).mul_(2 * tau) for name, kept in masks}


def _keep(name: str, score: Tensor, sparsity: Sparsity, pattern: NM | None) -> Tensor:
    """What a layer keeps of its own: all of it where the pattern does not fit."""
    if pattern is None:
        return keep_within(name, score, "layer", partial(budget, sparsity))
    return pattern.keep(score) if pattern.fits(score.shape[1]) else torch.ones_like(score, dtype=torch.bool)


def learn(
    view: PrunableView,
    scores: Mapping[str, Tensor],
    choose: Choice,
    batches: Iterable[Any],
    *,
    rounds: Sequence[int],
    lr: float,
    weight_decay: float,
    generators: Callable[[int], torch.Generator] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Name -> score (out, in), trained by AdamW for as many steps as there are rounds; lr goes linearly to 0.

    The model trains: in training mode, on the mean loss of each round's batches, with dropout that is a function of the
    batch's generator. Memory: score, gradient, two moments and the masked weight, for each prunable weight.

    scores: the first ones, which are overwritten. rounds: for each round, how many of its batches come here. generators
    and reduce: as in `sparsity.statistics.gradients`; ranks that share the rounds out get the scores that one alone
    gets.

    Raises UserError without batches, for a weight that gets no gradient, and for NaN or Inf, naming the layer.
    """
    generators = generators or (lambda number: batch_generator(42, number))
    numbered, trained = enumerate(batches), False
    moved = view.moved_by_loss
    with untouched(view.model, moved), only_prunable(view), summed_gradients(view) as sums:
        view.model.train()
        training = _Training(view, scores, choose, lr, weight_decay, sums)
        for step, own in enumerate(rounds):
            training.mask()
            for number, batch in islice(numbered, own):
                training.backward(batch, generators(number))
            trained |= training.step(1 - step / len(rounds), reduce)
    if not trained:
        raise UserError("there are no calibration batches")
    idle = [] if reduce else [name for name in scores if name in training.idle]
    if idle:
        raise UserError(f"layer {idle[0]!r} got no gradient from the loss")
    return dict(scores)


class _Training:
    """The model's weights under the masks of their scores.

    The parameters of the model stand on other storage, which holds the masked weights, until `untouched` gives them
    their own back: so every use of a tied weight sees the mask, and the model's own weights are never written to. sums:
    of the gradients since the last step, see `summed_gradients`.
    """

    def __init__(
        self,
        view: PrunableView,
        scores: Mapping[str, Tensor],
        choose: Choice,
        lr: float,
        weight_decay: float,
        sums: dict[str, Tensor],
    ):
        self.view, self.scores, self.choose, self.lr, self.sums = view, scores, choose, lr, sums
        first = next(iter(view.weights.values())).parameter
        self.device, self.forked = first.device, [first.device] if first.is_cuda else []
        self.idle, self.count = set(view.weights), 0  # layers without gradient so far, batches since the last step
        self.optimizer = torch.optim.AdamW(list(scores.values()), lr=lr, weight_decay=weight_decay, fused=True)
        self.dense = {name: weight.matrix() for name, weight in view.weights.items()}  # (out, in)
        self.masked = {}  # (out, in)
        for name, weight in view.weights.items():
            masked = torch.empty_like(weight.parameter.data)
            weight.parameter.data = masked
            self.masked[name] = masked.t() if weight.transposed else masked

    @torch.no_grad()
    def mask(self) -> None:
        """The masks of the scores as they are now."""
        for name, kept in self.choose(lambda names: ((each, self.scores[each].abs()) for each in names)):
            torch.mul(self.dense[name], kept, out=self.masked[name])
        torch.clear_autocast_cache()  # it holds the weights of the step before in half precision

    def backward(self, batch: Any, generator: torch.Generator) -> None:
        """Adds the gradients of a batch to those of the masked weights."""
        with torch.enable_grad(), _seeded(generator, self.forked):
            self.view.loss(batch, generator).backward()
        self.count += 1

    @torch.no_grad()
    def step(self, rate: float, reduce: Callable[[Tensor], Tensor] | None) -> bool:
        """One step along the mean gradient of the batches since the last one, at this share of lr; False where there
        were none on any rank, since none of their images could be read.
        """
        count, self.count = self.count, 0
        total = float(reduce(torch.tensor(float(count), device=self.device))) if reduce else count
        if not total:
            return False
        for name, weight in self.view.weights.items():
            gradient = self.sums.pop(name, None)
            if gradient is None:
                gradient = nothing(weight)
            else:
                self.idle.discard(name)
            gradient = reduce(gradient) if reduce else gradient
            score, matrix = self.scores[name], weight.as_matrix(gradient)
            of_mask = matrix.to(score.dtype).mul(self.dense[name]).div_(total)
            score.grad = torch.where(score < 0, -of_mask, of_mask)  # the sign of 0 is +1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True


@contextmanager
def _seeded(generator: torch.Generator, devices: Sequence[torch.device]) -> Iterator[None]:
    """Dropout draws from the global random state, of the processor and of these devices: here it is a function of the
    generator's, and put back afterwards.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
