"""Training of a model with learnable masks (sparsity.maskllm): what is trained, on what, and what is written."""

import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from configs.loading import save_config
from datasets.calibration.data_kinds import clear_skipped
from engine.export import save_weights
from engine.ranks import on_leader, place_of
from engine.sparse_training.held import Held
from engine.training.checkpoint import load_checkpoint, plain, save_checkpoint
from engine.training.fit import Run, fit
from engine.training.learning_tasks import Metrics, Task
from engine.training.loggers import Logger, WandbLog
from engine.training.timm_training import build_optimizer, build_rate
from sparsity.errors import UserError
from sparsity.files import write_atomic
from sparsity.learned.checkpoint import fold
from sparsity.learned.layer import folded
from sparsity.learned.learnable_masks import LearnableMasks
from sparsity.learned.schedule import Recipe, progress
from sparsity.masks import Masks, state_digest
from sparsity.view import PrunableView

log = logging.getLogger(__name__)

BEST, MASK, WEIGHTS, METRICS = "model_best.pth.tar", "mask.safetensors", "model.safetensors", "metrics.json"


class MaskedModel(nn.Module):
    """The module in training: a model with its masks, if it has any, and the moving average of both, if there is one.

    steps, unit: the course of tau and scaling, in steps of the run or in epochs of `unit` steps. regulariser: r of
    loss - r * ||W * mask||^2.
    """

    def __init__(
        self,
        task: Task,
        masks: LearnableMasks | None,
        recipe: Recipe,
        *,
        steps: int,
        unit: int,
        regulariser: float = 0.0,
        decay: float | None = None,
    ):
        super().__init__()
        self.model = task.view.model
        self.average = None if decay is None else ModelEmaV3(self.model, decay=decay)
        if self.average is not None:
            self.average.requires_grad_(False)
        self._task, self._masks, self._recipe = task, masks, recipe
        self._units, self._unit, self._regulariser = max(1, steps // unit), unit, regulariser

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The losses of a batch; "loss" is what is minimised."""
        if self._masks is None:
            return {"loss": self._task.loss(batch, step)}
        scaling, tau, strength = self._recipe.at(progress(min(step // self._unit, self._units - 1), self._units))
        self._masks.anneal(scaling, tau)
        self._masks.draw(step)
        loss = self._task.loss(batch, step)
        if not self._regulariser:
            return {"loss": loss}
        squared = self._masks.squared_weight()
        return {"loss": loss - self._regulariser * strength * squared, "task": loss, "kept": squared}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model is the moving average, where there is one."""
        pairs = [] if self.average is None else list(self._pairs())
        _exchange(pairs)
        try:
            yield
        finally:
            _exchange(pairs)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.model.parameters(), self.average.module.parameters(), strict=True)
        for name, other in self.average.module.named_buffers():  # what is drawn for a step comes later than the copy
            yield self.model.get_buffer(name), other

    def update_average(self, *_: Any) -> None:
        if self.average is not None:
            self.average.update(self.model)


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for own, other in pairs:
        own.data, other.data = other.data, own.data


@dataclass
class LearningRun(Run):
    """A run whose best weights are written as its results are."""

    export: Callable[[int, Metrics], None] | None = None

    @property
    def best_path(self) -> Path:
        return self.output_dir / BEST

    BEST_KEYS = ("metrics", "state_dict")

    def _keep_best(self, step: int, metrics: Metrics) -> None:
        self.export(step, metrics)


def read_prior(path: Path, view: PrunableView, read: Callable[[Path], dict[str, Tensor]]) -> Masks:
    """The masks of a mask file, or of the zeros of a checkpoint, which `read` gives as a state dict.

    Raises UserError, naming the file, where they are another model's or there are no zeros.
    """
    try:
        prior = Masks.load(path)
    except ValueError:
        prior = _zeros_of(path, view, fold(read(path)))
    try:
        prior.check(view)
    except ValueError as error:
        raise UserError(f"--sparse-checkpoint {path}: {error}") from error
    return prior


@torch.no_grad()
def start_from_weights(path: Path, view: PrunableView, prior: Masks, read: Callable[[Path], dict[str, Tensor]]) -> None:
    """Put the updated weights of a prior where it keeps them, and what else its checkpoint has, into the model.

    What it prunes keeps the weight that the model has, with which it can come back. path: of the weights, which `read`
    gives as a state dict. Raises UserError, naming the file, where one is missing.
    """
    state, resolved, put = fold(read(path)), prior.resolve(view), set()
    for weight in view.weights.values():
        name = next((alias for alias in weight.aliases if alias in state), None)
        if name is None or state[name].shape != weight.parameter.shape:
            raise UserError(f"--prior-weights {path}: it has no {weight.name} of this model's shape")
        mask = resolved[weight.name].to(weight.parameter.device)
        weight.parameter.copy_(torch.where(mask, state[name].to(weight.parameter), weight.parameter))
        put |= {*weight.aliases}
    for name, parameter in view.model.named_parameters():  # such as biases that were corrected
        if name in state and name not in put and state[name].shape == parameter.shape:
            parameter.copy_(state[name])


def _zeros_of(path: Path, view: PrunableView, state: dict[str, Tensor]) -> Masks:
    found = {}
    for weight in view.weights.values():
        name = next((alias for alias in weight.aliases if alias in state), None)
        if name is not None:
            found[weight.name] = state[name] != 0
    if not found or all(mask.all() for mask in found.values()):
        what = "has no zeros in the layers of this model" if found else "is of another model"
        raise UserError(f"--sparse-checkpoint {path}: {what}; give a mask file, or a checkpoint that is pruned")
    return Masks(found, {"zeros of": path.name})


class MaskLearning:
    """A model with learnable masks (or a fixed one, or none) in training: steps, logs and results.

    args: of maskllm_train.py. prior: masks to begin from; with args.sparsity_mode "sparse", to keep.
    """

    def __init__(self, args: Namespace, fabric: Any, task: Task, recipe: Recipe, prior: Masks | None):
        self.args, self.fabric, self.task, self.recipe, view = args, fabric, task, recipe, task.view
        self.identity = self._identity(prior)  # of the weights as they are before
        self.masks, hold = None, None
        if args.sparsity_mode == "maskllm":
            self.masks = LearnableMasks(view, args.pattern, hard=args.hard, gate_std=recipe.gate_std, seed=args.seed)
            if prior is not None:
                self.masks.start_from(prior, args.prior_strength)
            if args.mask_only:
                self.masks.freeze_weights()
        elif prior is not None:
            prior.apply(view)
        optimizer = build_optimizer(view.model, args)
        if args.sparsity_mode == "sparse":
            hold = Held(view, optimizer, prior)
        self.steps = args.steps or args.epochs * task.epoch_steps
        by_step = args.schedule_unit == "step"
        course = {"steps": self.steps, "unit": 1 if by_step else task.epoch_steps}
        decay = args.model_ema_decay if args.model_ema else None
        model = MaskedModel(task, self.masks, recipe, **course, regulariser=args.sparse_weight_reg, decay=decay)
        self.model = model
        self._watch(optimizer)
        wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
        epochs = max(1, -(-self.steps // task.epoch_steps))
        self.run = LearningRun(
            fabric=fabric,
            model=wrapped,
            optimizer=wrapped_optimizer,
            rate=build_rate(args, epochs, min(task.epoch_steps, self.steps), by_step),
            steps=self.steps,
            output_dir=args.folder,
            identity=self.identity,
            seed=args.seed,
            clip_norm=args.clip_grad or 0.0,
            log_every=args.log_interval,
            save_every=args.save_every or task.epoch_steps,
            validate_every=task.epoch_steps,
            validate=self._validate if task.select else None,
            select=task.select,
            hold=hold,
            snapshot=args.resume,
            export=self._export,
        )

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """The first step checks that every gate learns; each step moves the average."""
        optimizer.register_step_post_hook(self.model.update_average)
        if self.masks is not None:

            def check(*_: Any) -> None:
                self.masks.check_gradients()
                handle.remove()

            handle = optimizer.register_step_pre_hook(check)

    def _identity(self, prior: Masks | None) -> dict[str, Any]:
        ignored = ("folder", "output", "experiment", "resume", "log_interval", "save_every", "workers", "command")
        ignored += ("log_wandb", "wandb_project", "wandb_offline", "pattern", "config", "accelerator", "strategy")
        given = {name: _plain(value) for name, value in vars(self.args).items() if name not in ignored}
        weights = state_digest(self.task.view.model)
        identity = {"arguments": given, "weights": weights, "prior": prior.digest() if prior is not None else None}
        return identity | {"contents": self.task.contents}

    def fit(self) -> None:
        """Train on from the last checkpoint, to the end."""
        if not self.run.checkpoint_path.is_file():
            clear_skipped(self.args.folder, place_of(self.fabric))
        start = self.run.resume()
        if start < self.steps or self.run.unvalidated:
            self.run.loggers = on_leader(self.fabric, self._begin) or ()
            fit(self.run, self._batches(start), start)

    def _batches(self, start: int) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(self.task.batches(start, self.steps), start):
            yield {"batch": batch, "step": step}

    def finish(self) -> str:
        """Test the best masks, write the metrics; returns what was found, in a line for each test. A run that was
        finished before is left as it is.
        """
        done = self.fabric.broadcast(on_leader(self.fabric, self._done))
        if done is not None:
            return f"this run is finished; --output and --experiment choose another folder\n{self._told(done)}"
        if self.run.best is None:
            on_leader(self.fabric, partial(self._export, self.steps, {}))
        found = {"best": dict(self.run.best or {})}
        best = load_checkpoint(self.run.best_path, LearningRun.BEST_KEYS)
        self.model.model.load_state_dict(best["state_dict"])
        with folded(self.model.model), self.fabric.autocast():
            found["test"] = self.task.test()
        found |= {"val": best["metrics"], "run": self.run.digest}
        for logger in self.run.loggers:
            logger.write(self.steps, {f"test/{name}": value for name, value in found["test"].items()})
            logger.close()
        on_leader(self.fabric, partial(write_atomic, self.args.folder / METRICS, json.dumps(found, indent=1).encode()))
        return self._told(found)

    def _told(self, found: dict[str, Any]) -> str:
        tests = {name: metrics for name, metrics in found.items() if metrics and name != "run"}
        lines = [f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in of.items()) for name, of in tests.items()]
        return "\n".join([*lines, f"results: {self.args.folder}"])

    def _done(self) -> dict[str, Any] | None:
        """Return the metrics of this very run, where it is finished."""
        try:
            found = json.loads((self.args.folder / METRICS).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("run") == self.run.digest else None

    def _validate(self) -> Metrics:
        with self.model.averaged(), folded(self.model.model), self.fabric.autocast():
            return self.task.evaluate()

    def _export(self, step: int, metrics: Metrics) -> None:
        """timm's checkpoint with gates, the mask file, and weights with zeros that need no code of ours."""
        args, folder, model = self.args, self.args.folder, self.model.model
        with self.model.averaged():
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            facts = {"epoch": step // self.task.epoch_steps, "arch": args.model, "version": 2, "metric": None}
            facts |= {"metric": metrics.get(self.task.select), "metrics": metrics, "args": _settings(args)}
            facts |= {"step": step, "identity": plain(self.identity)}
            save_checkpoint(folder / BEST, {**facts, "state_dict": state})
            with folded(model):
                halves = self.task.view.halves
                save_weights(model, folder / WEIGHTS, halves=halves, without=("*.gate",), allowed=("vanished",))
            if self.masks is not None:
                recorded = {"method": "maskllm", "step": step, "metrics": metrics, **self.identity}
                self.masks.masks(recorded).save(folder / MASK)

    def _begin(self) -> list[Logger]:
        args = self.args
        save_config(_settings(args), args.folder / "config.yaml")
        if not args.log_wandb:
            return []
        named = {"project": args.wandb_project, "name": args.experiment, "tags": [str(args.pattern)]}
        return [WandbLog(args.folder, **named, offline=args.wandb_offline, config=_settings(args))]


def _settings(args: Namespace) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(args).items()}


def _plain(value: Any) -> Any:
    """Return the value as YAML, JSON and checkpoints hold it without a class of ours."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
