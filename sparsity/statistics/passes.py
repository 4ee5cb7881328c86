"""The statistics that a pruner can ask for, by name: one pass over the calibration batches gathers any of them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.statistics.checks import watched
from sparsity.statistics.gradients import Gradients, batch_generator
from sparsity.statistics.inputs import MEASURES, Statistics
from sparsity.view import PrunableView

GRADIENT, SQUARED = "mean_gradient", "squared_gradient"
OF_GRADIENTS = (GRADIENT, SQUARED)
# Statistic -> the measure that adds up, and its factor over the n real tokens.
_OWN = {"hessian": ("gram", 2.0), "input_means": ("input_sums", 1.0)}
_OF_DENSE = {"cross": ("products", 1.0), "dense_hessian": ("dense_gram", 2.0), "dense_means": ("dense_sums", 1.0)}
_SCALED = _OWN | _OF_DENSE
# Statistic -> the same over the tokens that are held out alone, and from which it is subtracted for all others.
_SPLIT: dict[str, tuple[str, str | None, float]] = {
    "held_out": ("held_out_gram", None, 2.0),
    "training": ("held_out_gram", "gram", 2.0),
    "held_out_means": ("held_out_sums", None, 1.0),
    "training_means": ("held_out_sums", "input_sums", 1.0),
}
_HELD_OUT = "held_out_tokens"
OF_INPUTS = (*MEASURES, *_SCALED, *_SPLIT)
PASSES = (*(name for name in OF_INPUTS if name not in _OF_DENSE), *OF_GRADIENTS)  # the others take two models


def collect(
    view: PrunableView,
    statistics: str | Sequence[str],
    batches: Iterable[Any],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    generators: Callable[[int], torch.Generator] | None = None,
    names: Collection[str] | None = None,
    offload: bool = False,
    announced: int | None = None,
) -> dict[str, Any]:
    """Return name of each prunable weight -> its statistic over the batches; of several statistics, which one pass over
    the batches gathers, statistic -> such a mapping.

    "input_norms" (in,): sums of squares over the n real tokens, "input_means" (in,), "hessian": (2/n) X X^T as strips
    (`sparsity.statistics.hessian`), "mean_gradient" (out, in), "squared_gradient" (out, in): mean over the batches of
    the square of each one's gradient. "input_sums" and "gram" are the bare sums. "held_out" and "training" are the
    hessian over a tenth of the samples and over the others, "held_out_means" and "training_means" their means. Layers
    that have read the very same tensors get the very same statistic: nobody may write to it.

    reduce: sums a tensor over ranks, each of which reads its own batches. generators: number of a batch -> the
    generator of what the loss draws there. names: of the weights that are asked about (default: all), without those
    that stay dense; offload: whether sums are kept in the memory of the processor; neither is for gradients. announced:
    how many batches are to come here, where `batches` does not say it; fewer are used, with a warning.

    Raises UserError for a statistic that does not exist, and, naming all layers concerned, for layers that no batch
    reaches (a warning after the first batch) and for NaN or Inf (already after the first batch).
    """
    wanted = [statistics] if isinstance(statistics, str) else list(statistics)
    for statistic in wanted:
        if statistic not in PASSES:
            raise UserError(f"there is no statistic {statistic!r}; there are: {', '.join(PASSES)}")
    measures = measures_of(wanted)
    nobody = names is not None and not names
    inputs = Statistics(view, measures, names, offload=offload) if measures and not nobody else None
    gradients, of_gradients = None, [statistic for statistic in OF_GRADIENTS if statistic in wanted]
    if len(of_gradients) > 1:
        raise UserError(f"{' and '.join(of_gradients)} come from a pass each: ask for one of them")
    if of_gradients:
        gradients = Gradients(view, generators or partial(batch_generator, 42), squared=SQUARED in wanted)
    found: dict[str, dict[str, Tensor]] = {statistic: {} for statistic in wanted}
    _read(inputs, gradients, batches, reduce, announced)
    if inputs:
        found |= scaled(inputs.results(), inputs.tokens, wanted)
    if gradients:
        found[of_gradients[0]] = gradients.means(reduce)
    return found[statistics] if isinstance(statistics, str) else found


def measures_of(statistics: Sequence[str]) -> list[str]:
    """Return the measures of inputs that add up to these statistics."""
    found: list[str] = []
    for statistic in statistics:
        if statistic in _SPLIT:
            part, whole, _ = _SPLIT[statistic]
            found += [part, _HELD_OUT, *([whole] if whole else [])]
        elif statistic not in OF_GRADIENTS:
            found.append(_SCALED[statistic][0] if statistic in _SCALED else statistic)
    return list(dict.fromkeys(found))


def _read(
    inputs: Statistics | None,
    gradients: Gradients | None,
    batches: Iterable[Any],
    reduce: Callable[[Tensor], Tensor] | None,
    announced: int | None,
) -> None:
    """Run the batches through what is there; inputs are summed over ranks in the end, gradients where they are read."""
    gathering = [each for each in (inputs, gradients) if each]
    if not gathering:
        return

    def look() -> None:
        for each in gathering:
            each.look(reduce)

    with gathering[-1]:
        for batch in watched(batches, announced, look):
            if inputs and gradients:
                # Its hooks must not see the forward of the loss, nor the loss what this forward leaves behind.
                with inputs:
                    inputs.add(batch)
                gradients.add(batch)
            else:
                gathering[0].add(batch)
    if inputs and reduce:
        inputs.reduce(reduce)


def scaled(
    sums: dict[str, dict[str, Tensor]], tokens: dict[str, int], wanted: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics that are made of sums: in place where nothing else is made of the same sum, once for all
    layers that share one. Those of a split are missing where all tokens of a layer are on one side of it.
    """
    found = {}
    uses = Counter(measure for statistic in wanted for measure in measures_of([statistic]))
    for statistic in wanted:
        if statistic in _SPLIT:
            found[statistic] = _split(sums, tokens, *_SPLIT[statistic])
        elif statistic in _SCALED:
            measure, factor = _SCALED[statistic]
            made: dict[int, Tensor] = {}
            for name, total in sums[measure].items():
                if id(total) not in made:
                    scale = factor / tokens[name]
                    made[id(total)] = total * scale if uses[measure] > 1 else total.mul_(scale)
            found[statistic] = {name: made[id(total)] for name, total in sums[measure].items()}
        else:
            found[statistic] = sums.get(statistic, {})
    return found


def _split(
    sums: dict[str, dict[str, Tensor]], tokens: dict[str, int], part: str, whole: str | None, factor: float
) -> dict[str, Tensor]:
    """Return a mean over the tokens that are held out, or over all others, where `whole` is the sum over all."""
    found: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, total in sums[part].items():
        apart = round(float(sums[_HELD_OUT][name]))
        if not 0 < apart < tokens[name]:
            continue
        if id(total) not in made:
            if whole is None:
                made[id(total)] = total * (factor / apart)
            else:
                made[id(total)] = (sums[whole][name] - total).mul_(factor / (tokens[name] - apart))
        found[name] = made[id(total)]
    return found
