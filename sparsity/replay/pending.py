"""Tensors that have a shape and no values, and how a forward pass ends that reads one."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsity.replay.trace import Output


class StopPass(BaseException):
    """Ends a forward pass that has nothing more to give. Not an Exception, which models may catch."""


class ReadPending(BaseException):
    """A tensor without values was read."""

    def __init__(self, output: Output):
        super().__init__(output)
        self.output = output


class Pending(Tensor):
    """Stands for the output of a call whose values are not there."""

    output: Output
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, output: Output, size: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> "Pending":
        tensor = Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=device)  # pyright: ignore
        tensor.output = output
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise ReadPending(next(leaf.output for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pending)))
