"""Early and complete errors of a calibration: every layer that is concerned is named, and every rank says the same.

After the first batch of all ranks, NaN and Inf are errors: no later batch takes them out of a sum. That a layer was not
reached is a warning then, since a later batch may reach it (images before texts, an expert that is rarely chosen), and
an error once all batches have been read.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError, listed
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

UNSEEN = "saw no calibration sample"
IDLE = "got no gradient from the loss"
NO_BATCHES = "there are no calibration batches"
_NAMED = 10  # layers, before a message says how many more there are


def check_weights(view: PrunableView) -> None:
    """Raise UserError, naming all layers concerned, where prunable weights hold NaN or Inf, or nothing at all (on the
    meta device).
    """
    empty = [name for name, weight in view.weights.items() if weight.parameter.is_meta]
    if empty:
        raise UserError(
            f"the weights of {_layers(empty)} are on the meta device, where there are no numbers: load the model with"
            " its weights in memory (no device_map that offloads, no init_empty_weights)"
        )
    bad = [name for name, weight in view.weights.items() if not finite(weight.parameter.detach())]
    if bad:
        raise not_finite("weights", bad)


def finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor holds neither NaN nor Inf, with no copy of it."""
    # NaN is the least and the greatest.
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def not_finite(what: str, names: Sequence[str]) -> UserError:
    """Return the error that these tensors ("weights", "inputs" or "gradient") of the layers hold NaN or Inf."""
    verb = "hold" if what.endswith("s") else "holds"
    others = f" (also of {listed(names[1:], _NAMED)})" if len(names) > 1 else ""
    return UserError(f"the {what} of layer {names[0]!r} {verb} NaN or Inf{others}")


def not_reached(what: str, names: Sequence[str]) -> UserError:
    """Return the error that the layers were not reached by any batch. what: UNSEEN or IDLE."""
    return UserError(
        f"{_layers(names)} {what}; keep {'it' if len(names) == 1 else 'them'} dense (keep_dense, --exclude)"
    )


def look(
    what: str,
    holding: str,
    facts: Mapping[str, tuple[bool, bool]],
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] | None,
) -> None:
    """Report what is known after the first batch: every rank calls this once, with the same layers.

    facts: layer -> whether this rank has reached it, and whether what it has is finite. what: UNSEEN or IDLE. holding:
    "inputs" or "gradient". Raises UserError for NaN and Inf on any rank; layers that no rank has reached are logged.
    """
    names, mine = list(facts), [int(reached) for reached, _ in facts.values()]
    both = summed(mine + [int(not fine) for _, fine in facts.values()], device, reduce)
    reached, bad = both[: len(names)], both[len(names) :]
    if any(bad):
        raise not_finite(holding, [name for name, ranks in zip(names, bad, strict=True) if ranks])
    missing = [name for name, ranks in zip(names, reached, strict=True) if not ranks]
    if missing and any(reached):  # without any batch the end says it
        warn_not_reached(what, missing)


def warn_not_reached(what: str, names: Sequence[str]) -> None:
    """Warn of layers that the first batch has not reached on any rank. what: UNSEEN or IDLE."""
    logger.warning("%s %s in the first batch: an error unless a later one changes it", _layers(names), what)


def summed(numbers: Sequence[int], device: torch.device, reduce: Callable[[Tensor], Tensor] | None) -> list[int]:
    """Return the sums over ranks of some numbers, of which each rank gives as many, on the device."""
    return reduce(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist() if reduce else list(numbers)


def watched(
    batches: Iterable[Any], announced: int | None = None, after_first: Callable[[], None] | None = None
) -> Iterator[Any]:
    """Yield the batches, and call `after_first` once: when the first has been used, or at the end where there is none.

    announced: how many are to come here; by default as many as `batches` says that it has. Where fewer come, a warning
    tells how many of how many are used.
    """
    announced, count = length(batches) if announced is None else announced, 0
    for batch in batches:
        yield batch
        count += 1
        if after_first and count == 1:
            after_first()
    if after_first and count == 0:
        after_first()
    warn_ended_early(count, announced)


def warn_ended_early(count: int, announced: int | None) -> None:
    """Warn where fewer batches came than were announced (None: it is not known how many)."""
    if announced is not None and count < announced:
        logger.warning("the calibration data ended early: %d of %d batches came, and are used", count, announced)


def length(batches: Iterable[Any]) -> int | None:
    """Return how many batches there are to come, None where they do not say."""
    try:
        return len(batches)  # pyright: ignore[reportArgumentType]
    except TypeError:  # a generator, or a loader or progress bar around one
        return None


def _layers(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return f"layer {quoted[0]}" if len(names) == 1 else f"layers {listed(quoted, _NAMED)}"
