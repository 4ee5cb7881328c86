"""What one process does for all of them, and what they add up."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from datasets.place import Place

T = TypeVar("T")


def on_leader(fabric: Any, call: Callable[[], T]) -> T | None:
    """What `call` gives on rank 0; None on the others, which wait for it.

    An error that the user can mend, as a full disk, is raised on all ranks: none waits for one that is gone.
    """
    result, failed = None, None
    if fabric.is_global_zero:
        try:
            result = call()
        except (ValueError, OSError) as error:
            failed = error
    failed = fabric.broadcast(failed)
    if failed is not None:
        raise failed
    return result


def summed(fabric: Any, tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, on the device of each."""
    if fabric.world_size == 1:
        return tensor
    return fabric.all_reduce(tensor.to(fabric.device), reduce_op="sum").to(tensor.device)


def place_of(fabric: Any) -> Place:
    """Return where this process stands among the ranks."""
    return Place(fabric.global_rank, fabric.world_size)
