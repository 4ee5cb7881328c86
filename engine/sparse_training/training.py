"""Sparse training of a task model: what learns, what the loss is, and what stays zero."""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.options.sparse_training import SparseOptions
from engine.sparse_training.gradual import Gradual
from engine.sparse_training.held import Held, Shadowed
from engine.sparse_training.lora import Adapted, Adapters
from engine.sparse_training.taught import Taught
from sparsity.errors import UserError, listed
from sparsity.files import reading
from sparsity.masks import Masks
from sparsity.view import PrunableView, canonical

log = logging.getLogger(__name__)
INNER = "model."  # where a task model has a model of another library in its checkpoints


class SparseTraining:
    """How a task model is trained. To be made of the dense model, before its masks are applied; it changes nothing yet.

    new: globs of the parameters that the pretrained model does not have. device: where the model will be. model: the
    task model, where the view is of a model in it.
    """

    def __init__(
        self,
        options: SparseOptions,
        view: PrunableView,
        new: Sequence[str],
        seed: int,
        device: torch.device,
        model: nn.Module | None = None,
    ):
        self.model = view.model if model is None else model
        self.options, self.view, self._new, self._seed, self._device = options, view, new, seed, device
        self._teacher = None if options.distill is None else self._teach()
        self._dense = self._shadows() if options.gradual and options.gradual.regrow else {}
        self._adapters: Adapters | None = None

    @property
    def teacher(self) -> nn.Module:
        """Return what teaches, once `module` has been called."""
        assert self._teacher is not None, "there is one with --distill"
        return self._teacher

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return name and parameter of what learns; with adapters, all else is frozen from here on."""
        if self.options.lora is None:
            return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._adapters = Adapters(self.view, self.options.lora, self._new, self._seed, self._device, self.model)
        return list(self._adapters.named_parameters())

    def module(self) -> nn.Module:
        """Return what is called with a batch: the model, or the model beside its teacher."""
        if self._teacher is None or self.options.distill is None:
            return self.model
        task_model: Any = self.model  # of models/parts/task_model.py
        untaught = () if self.options.teacher else task_model.untaught
        if untaught and self.options.distill == 1:
            raise UserError(
                f"--distill 1: the weights that the run starts from have no {', '.join(untaught)} to teach: the head is"
                " new; give --teacher FILE, or --distill below 1, which learns from labels too"
            )
        return Taught(self.view, self._teacher.to(self._device), self.options.distill, untaught, self.model)

    def held(self, optimizer: torch.optim.Optimizer, masks: Masks | None, steps: int) -> Held:
        """Return what keeps zeros in training, and prunes. optimizer: of `parameters`. masks: those of the start."""
        gradual = self.options.gradual
        course = None if gradual is None else Gradual(gradual, self.view, masks, steps, self._seed)
        if self._adapters is not None:
            return Adapted(self.view, optimizer, masks, course, adapters=self._adapters)
        if self._dense:
            return Shadowed(self.view, optimizer, masks, course, dense=self._dense)
        return Held(self.view, optimizer, masks, course)

    def facts(self) -> dict[str, Any]:
        """Return what a model card says of it."""
        options, found = self.options, {}
        if gradual := options.gradual:
            returns = ", weights may return" if gradual.regrow else ""
            course = f"from {gradual.start:g} to {gradual.until:g} of the run{returns}"
            found["gradual"] = f"{gradual.target} by {gradual.score}, {course}"
        if options.distill:
            teacher = options.teacher or "the weights that the run started from"
            found["distill"] = f"{options.distill:g} of the loss, teacher: {teacher}"
        if self._adapters is not None:
            share = self._adapters.numel / sum(p.numel() for p in self.view.model.parameters())
            found["lora"] = f"rank {options.lora}, merged; {100 * share:.2f} % as many numbers trained as the model has"
        return found

    def _shadows(self) -> dict[str, Tensor]:
        return {name: weight.parameter.detach().clone() for name, weight in self.view.weights.items()}

    def _teach(self) -> nn.Module:
        """Return a copy of the model, with the weights of a file where one is given."""
        if not self.view.has_outputs:
            raise UserError("--distill: this model's view has no outputs that a teacher could be asked for")
        teacher = copy.deepcopy(self.view.model)
        if self.options.teacher:
            task_model: Any = self.model  # of models/parts/task_model.py
            load_teacher(teacher, self.options.teacher, task_model.read_result)
        return teacher


def load_teacher(
    model: nn.Module, path: Path, read: Callable[[Path], dict[str, Tensor] | None] = lambda path: None
) -> None:
    """Put the weights of a finished run into a model. UserError for a file of another model or task.

    read: returns the weights of files that have them under other names, None of all others.
    """
    with reading(path):
        try:
            state = read(path) or (load_file(path) if path.suffix == ".safetensors" else _model_of(path))
        except UserError:
            raise
        except Exception as error:  # whatever a file of another kind makes of it
            raise UserError(f"--teacher {path}: no weights can be read from it ({type(error).__name__})") from error
    own = model.state_dict()
    state = {canonical(name): tensor for name, tensor in state.items()}
    if all(name.startswith(INNER) for name in state) and not all(name.startswith(INNER) for name in own):
        state = {name.removeprefix(INNER): tensor for name, tensor in state.items()}
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong or len(state) > len(own):
        other = wrong or [name for name in state if name not in own]
        raise UserError(f"--teacher {path}: weights of another model or task: {listed(other, 3)}")
    model.load_state_dict(state)


def _model_of(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"--teacher {path}: no checkpoint of a run of this script, last.pt or best.pt")
    return state["model"]
