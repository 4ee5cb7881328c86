"""Weights in training: what stays zero, before and after each step of the optimizer.

The three classes differ in what learns: each kept weight (`Held`), each weight, pruned ones unseen (`Shadowed`), or
low-rank adapters (`engine.sparse_training.lora.Adapted`). Outside `before_step` ... `after_step` the model holds the
weights that it computes with, with zeros, so that it can be evaluated and saved as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.sparse_training.gradual import Gradual
from sparsity.bits import Bits
from sparsity.masks import Hold, Masks
from sparsity.view import PrunableView


class Held:
    """Each kept weight learns, and pruned ones stay zero.

    masks: those of now, applied here; None: the model is dense. gradual: what prunes it on the way. optimizer: moments
    of newly pruned weights become zero.
    """

    def __init__(
        self,
        view: PrunableView,
        optimizer: torch.optim.Optimizer,
        masks: Masks | None = None,
        gradual: Gradual | None = None,
    ):
        self.view, self.optimizer, self.masks, self.gradual = view, optimizer, masks, gradual
        self._hold: Hold | None = None
        if masks is not None:
            self.wear(masks)

    def begin_step(self, step: int) -> None:
        """Prune, where a new mask is due before this step."""
        if self.gradual is not None and self.gradual.schedule.due(step):
            self.wear(self.gradual.masks(step, self.magnitudes, self.masks))
            if step == self.gradual.schedule.last:
                self.settle()

    def before_step(self) -> None:
        """Mask the gradients: after backward, before clipping."""
        if self._hold is not None:
            self._hold.before_step()

    def after_step(self) -> None:
        """Bring the weights that the model computes with back, when the optimizer has moved. Twice does no harm."""

    def settled(self, done: int) -> bool:
        """Return whether the model has had its last mask for at least one of `done` steps."""
        return self.gradual is None or done > self.gradual.schedule.last

    def verify(self) -> None:
        """Make sure that pruned weights are zero."""
        if self._hold is not None:
            self._hold.verify()

    def magnitudes(self, name: str) -> Tensor:
        """Return what the weights of a layer are pruned by, (out, in)."""
        return self.view.weights[name].matrix().abs()

    def wear(self, masks: Masks) -> None:
        """Have these masks from here on."""
        self.masks = masks
        self._hold = masks.hold(self.view, self.optimizer)

    def settle(self) -> None:
        """The mask of now is the last one."""

    def sparsity(self) -> dict[str, float]:
        """Return what the log says of masks that change."""
        masks = self.masks
        return {} if self.gradual is None else {"sparsity": 0.0 if masks is None else 1 - masks.kept / masks.total}

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on from, besides model and optimizer."""
        if self.gradual is None or self.masks is None:
            return {}
        return {"masks": {name: Bits.of(mask).packed for name, mask in self.masks.resolve(self.view).items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, once model and optimizer have theirs."""
        if masks := self._masks_of(state):
            self.wear(masks)

    def _masks_of(self, state: dict[str, Any]) -> Masks | None:
        if self.gradual is None or "masks" not in state:
            return None
        shapes = {name: weight.parameter.shape for name, weight in self.view.weights.items()}
        return self.gradual.made({name: Bits.read(bits, shapes[name]) for name, bits in state["masks"].items()})


class Derived(Held):
    """Base of those whose parameters are computed from what learns: zeros are put in each time."""

    def __init__(self, *args: Any, **options: Any):
        self._gone: dict[str, Tensor] = {}  # name -> what is pruned, in the parameter's layout
        super().__init__(*args, **options)

    def wear(self, masks: Masks) -> None:
        parameters = {name: weight.parameter for name, weight in self.view.weights.items()}
        self.masks = masks
        self._gone = {name: ~mask.to(parameters[name].device) for name, mask in masks.resolve(self.view).items()}
        self._zero()

    def verify(self) -> None:
        super().verify()
        self._zero()

    @torch.no_grad()
    def _zero(self) -> None:
        for name, gone in self._gone.items():
            self.view.weights[name].parameter.masked_fill_(gone, 0)


class Shadowed(Derived):
    """Each weight learns, and pruned ones may return: the model computes with W * M, and the gradient with respect to
    that goes to all of W, straight through.

    The parameters are W * M, but for the step itself, in which they are W. Once the last mask is there, kept weights
    alone learn. dense: name -> W at the start, in the parameter's layout, on any device.
    """

    def __init__(self, view: PrunableView, *args: Any, dense: Mapping[str, Tensor], **options: Any):
        self._shadows = _beside(view, dense)
        self._stepping = False
        super().__init__(view, *args, **options)

    def before_step(self) -> None:
        super().before_step()  # once the last mask is there
        self._stepping = True
        self._unmask()

    @torch.no_grad()
    def after_step(self) -> None:
        if self._stepping:
            for name, shadow in self._shadows.items():
                shadow.copy_(self.view.weights[name].parameter)
            self._zero()
        self._stepping = False

    def magnitudes(self, name: str) -> Tensor:
        return self.view.weights[name].as_matrix(self._shadows[name]).abs()

    def wear(self, masks: Masks) -> None:
        if self._shadows:
            self._unmask()
            super().wear(masks)
        else:
            Held.wear(self, masks)

    def settle(self) -> None:
        assert self.masks is not None, "the last mask was chosen"
        self._shadows, self._gone = {}, {}
        self.wear(self.masks)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shadows": dict(self._shadows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._shadows, self._gone = _beside(self.view, state["shadows"]), {}
        super().load_state_dict(state)

    @torch.no_grad()
    def _unmask(self) -> None:
        for name, shadow in self._shadows.items():
            self.view.weights[name].parameter.copy_(shadow)


def _beside(view: PrunableView, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name on the devices of the weights, in memory of their own."""
    weights = view.weights
    return {name: tensor.to(weights[name].parameter.device, copy=True) for name, tensor in tensors.items()}
