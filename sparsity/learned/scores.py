"""Scores that are learned, arXiv 2204.11218: a mask is trained, and the weights under it stay as they are.

Each weight has a score m. Its mask is 1 where abs(m) is among the highest, and exactly as many weights as asked for are
masked in every step. The gradient passes straight through the choice: that of m is the mask's, times the sign of m. So
a pruned weight is judged too, and comes back when its score grows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity, budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.selection import Named, keep_pattern, keep_within, thresholds
from sparsity.statistics.checks import (
    IDLE,
    NO_BATCHES,
    finite,
    not_finite,
    not_reached,
    summed,
    warn_ended_early,
    warn_not_reached,
)
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
    # Half precision would lose the steps of the optimizer. Allocated together: between what is computed for single
    # layers they would leave holes in memory.
    scores = {n: w.parameter.new_empty(w.shape, dtype=wide(w.parameter.dtype)) for n, w in view.weights.items()}
    for name, kept in masks:
        torch.mul(kept, 2 * tau, out=scores[name])
    return scores


def _keep(name: str, score: Tensor, sparsity: Sparsity, pattern: NM | None) -> Tensor:
    """Return what a layer keeps of its own: all of it where the pattern does not fit."""
    if pattern is None:
        return keep_within(name, score, "layer", partial(budget, sparsity))
    return keep_pattern(pattern, name, score)


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
    batch's generator. Memory, for each prunable weight: score, two moments and the masked weight, and the sum of the
    gradients where a round has several batches or there are several ranks; else each gradient is used as it arrives.

    scores: the first ones, which are overwritten. rounds: for each round, how many of its batches come here; fewer are
    used, with a warning. generators and reduce: as in `sparsity.statistics.gradients`; ranks that share the rounds out
    get the scores that one alone gets.

    Raises UserError without batches, and, naming all layers concerned, for weights that get no gradient from any batch
    (a warning after the first step) and for NaN or Inf, in the step where they come.
    """
    generators = generators or (lambda number: batch_generator(42, number))
    numbered, count = enumerate(batches), 0
    with untouched(view.model, view.moved_by_loss), only_prunable(view), summed_gradients(view) as sums:
        view.model.train()
        training = _Training(view, scores, choose, weight_decay, sums, reduce)
        for step, own in enumerate(rounds):
            training.begin(lr * (1 - step / len(rounds)), at_once=own == 1 and reduce is None)
            for number, batch in islice(numbered, own):
                training.backward(batch, generators(number))
                count += 1
            training.step()
    warn_ended_early(count, sum(rounds))
    if not training.steps:
        raise UserError(NO_BATCHES)
    if training.idle:
        raise not_reached(IDLE, training.idle)
    return dict(scores)


def _adamw(score: Tensor, **options: Any) -> torch.optim.AdamW:
    """AdamW of one tensor, whose moments are there from the start: in the first step they would be allocated between
    gradients, and leave holes in memory.
    """
    optimizer = torch.optim.AdamW([score], **options)
    moments = {name: torch.zeros_like(score) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[score] = {"step": torch.zeros((), dtype=torch.float32, device=score.device), **moments}
    return optimizer


class _Training:
    """The model's weights under the masks of their scores.

    The parameters of the model stand on other storage, which holds the masked weights, until `untouched` gives them
    their own back: so every use of a tied weight sees the mask, and the model's own weights are never written to. sums:
    of the gradients since the last step, see `summed_gradients`. A score is moved by an optimizer of its own, so that
    its gradient is freed before the next one comes.
    """

    def __init__(
        self,
        view: PrunableView,
        scores: Mapping[str, Tensor],
        choose: Choice,
        weight_decay: float,
        sums: dict[str, Tensor],
        reduce: Callable[[Tensor], Tensor] | None,
    ):
        self.view, self.scores, self.choose, self.sums, self.reduce = view, scores, choose, sums, reduce
        self.device, self.forked = view.device, view.accelerators
        self.idle = list(view.weights)  # layers without gradient on any rank so far
        self.count, self.steps = 0, 0  # batches since the last step, steps
        self.moved: set[str] = set()  # scores that have made this step already
        self.bad: list[str] = []
        options = {"lr": 0.0, "weight_decay": weight_decay, "fused": True}
        self.optimizers = {name: _adamw(score, **options) for name, score in scores.items()}
        self.dense = {name: weight.matrix() for name, weight in view.weights.items()}  # (out, in)
        self.masked = {}  # (out, in)
        for name, weight in view.weights.items():
            masked = torch.empty_like(weight.parameter.data)
            weight.parameter.data = masked
            self.masked[name] = masked.t() if weight.transposed else masked

    @torch.no_grad()
    def begin(self, lr: float, at_once: bool) -> None:
        """Mask the weights by the scores as they are now, for a step at this rate. at_once: one batch makes the step,
        so that a gradient moves its score as soon as it is there.
        """
        for name, kept in self.choose(lambda names: ((each, self.scores[each].abs()) for each in names)):
            torch.mul(self.dense[name], kept, out=self.masked[name])
        torch.clear_autocast_cache()  # it holds the weights of the step before in half precision
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        self.at_once = at_once

    def backward(self, batch: Any, generator: torch.Generator) -> None:
        """Adds the gradients of a batch to those of the masked weights, or moves the scores at once."""
        with ExitStack() as stack:
            if self.at_once:  # after the hooks that have put the gradient into the sums
                for name, weight in self.view.weights.items():
                    hook = partial(self._arrived, name)
                    stack.callback(weight.parameter.register_post_accumulate_grad_hook(hook).remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_seeded(generator, self.forked))
            self.view.loss(batch, generator).backward()
        self.count += 1

    def _arrived(self, name: str, _: Tensor) -> None:
        if name in self.moved:  # the score has moved along a part of its gradient
            raise UserError(f"layer {name!r} gets its gradient in parts: use checkpointing with use_reentrant=False")
        self._move(name, self.sums.pop(name), 1)
        self.moved.add(name)

    @torch.no_grad()
    def _move(self, name: str, gradient: Tensor, count: float) -> None:
        """Move a score along the sum of the gradients of its masked weight over `count` batches, which is given up."""
        if not finite(gradient):
            self.bad.append(name)
        score, matrix = self.scores[name], self.view.weights[name].as_matrix(gradient)
        of_mask = matrix.to(score.dtype).mul_(self.dense[name]).div_(count)
        score.grad = torch.where(score < 0, -of_mask, of_mask)  # the sign of 0 is +1
        self.optimizers[name].step()
        score.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Finish the step along the mean gradient of the batches since the last one; there is none where there were no
        batches on any rank, since none of their images could be read.
        """
        own = [self.count, *(int(name in self.sums or name in self.moved) for name in self.view.weights)]
        total, *ranks = summed(own, self.device, self.reduce)
        self.count = 0
        if not total:
            return
        reached = {name for name, number in zip(self.view.weights, ranks, strict=True) if number}
        self.idle = [name for name in self.idle if name not in reached]
        for name, weight in self.view.weights.items():
            if name in self.moved:
                continue
            gradient = self.sums.pop(name, None)
            gradient = nothing(weight) if gradient is None else gradient
            self._move(name, self.reduce(gradient) if self.reduce else gradient, total)
        self.moved.clear()
        if self.bad:
            raise not_finite("gradient", [name for name in self.view.weights if name in self.bad])
        self.steps += 1
        if self.steps == 1 and self.idle:
            warn_not_reached(IDLE, self.idle)


@contextmanager
def _seeded(generator: torch.Generator, devices: Sequence[torch.device]) -> Iterator[None]:
    """Dropout draws from the global random state, of the processor and of these devices: here it is a function of the
    generator's, and put back afterwards.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
