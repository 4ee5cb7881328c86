"""The training loop of every script."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from engine.ranks import on_leader
from engine.training.checkpoint import differences, load_checkpoint, save_checkpoint
from engine.training.loggers import CsvLog, Logger
from sparsity.errors import MissingFileError, UserError
from sparsity.files import remove_leftovers
from sparsity.masks import Hold


@dataclass
class Run:
    """What a run is made of; `fit` moves it forward.

    rate: factor of each parameter group's peak learning rate at a step. identity: what the run depends on, as plain
    values; a checkpoint of another one is refused. clip_norm: of the gradient; 0 does not clip. validate: called every
    `validate_every` steps on every rank, returns metrics for the log, as validation/<name>. select: the metric whose
    highest value says which weights are the best. accumulate: batches of a step. hold: keeps pruned weights at zero.
    snapshot: the checkpoint; default last.pt in `output_dir`. loggers: of rank 0, besides log.csv.
    """

    fabric: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    steps: int
    output_dir: Path
    identity: dict[str, Any]
    seed: int
    clip_norm: float = 1.0
    log_every: int = 20
    save_every: int = 200
    validate_every: int = 500
    validate: Callable[[], dict[str, float]] | None = None
    select: str | None = None
    accumulate: int = 1
    hold: Hold | None = None
    snapshot: Path | None = None
    loggers: Sequence[Logger] = ()
    best: dict[str, float] | None = None  # {"step", "value"} of the best weights so far

    @property
    def checkpoint_path(self) -> Path:
        return self.snapshot or self.output_dir / "last.pt"

    @property
    def best_path(self) -> Path:
        return self.output_dir / "best.pt"

    def resume(self) -> int:
        """Load the checkpoint of an earlier run in the same folder, if there is one; returns the first step to do.

        Raises UserError where the checkpoint cannot be read or belongs to a run of another configuration.
        """
        if not self.checkpoint_path.is_file():
            return 0
        state = load_checkpoint(self.checkpoint_path, ("step", "identity", "model", "optimizer", "precision"))
        changed = differences(state["identity"], self.identity)
        if changed:
            raise UserError(
                f"{self.checkpoint_path}: belongs to a run of another configuration ({'; '.join(changed)}); choose "
                "another --output_dir, or delete it"
            )
        self.best = state.get("best")
        if self.best and not self.best_path.is_file():
            raise MissingFileError(f"{self.best_path}: not found, and {self.checkpoint_path} goes with it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self._verify()
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps; the ranks wait for the one that writes."""
        self._verify()
        state = {
            "step": step,
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
            "best": self.best,
        }
        on_leader(self.fabric, partial(self._write, self.checkpoint_path, state))

    def offer(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the weights of now as the best ones if they are, by the metric `select`."""
        value = metrics[self.select]
        if self.best is None or value > self.best["value"]:
            self._verify()
            self.best = {"step": step, "value": value}
            state = {"step": step, "metrics": metrics, "model": self.model.state_dict()}
            on_leader(self.fabric, partial(self._write, self.best_path, state))

    def load_best(self) -> None:
        """Bring the best weights back, where a metric selected them."""
        if self.best is not None:
            self.model.load_state_dict(load_checkpoint(self.best_path, ("model",))["model"])
            self._verify()

    def _verify(self) -> None:
        if self.hold is not None:
            self.hold.verify()

    @staticmethod
    def _write(path: Path, state: dict[str, Any]) -> None:
        remove_leftovers(path)
        save_checkpoint(path, state)


def fit(run: Run, batches: Iterable[dict[str, Any]], start: int, stop: int | None = None) -> None:
    """Train from step `start` to `stop`, by default `run.steps`, on `batches`, each the keyword arguments of one
    `model(...)` call, `run.accumulate` of them in a step.

    All randomness of a batch is seeded by (seed, its number, rank), so a resumed run equals an uninterrupted one.
    Raises UserError when the loss is no longer finite, before that is saved.
    """
    stop = run.steps if stop is None else stop
    leads = run.fabric.is_global_zero
    log = _Log(run.fabric, [CsvLog(run.output_dir / "log.csv", start), *run.loggers] if leads else [])
    peaks = [group.setdefault("peak", group["lr"]) for group in run.optimizer.param_groups]
    batches = iter(batches)
    with tqdm(total=run.steps, initial=start, desc="training", disable=not leads, mininterval=2) as bar:
        for step in range(start, stop):
            for group, peak in zip(run.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * run.rate(step)
            norm = _step(run, batches, step, log)
            done = step + 1

            def due(every: int, done: int = done) -> bool:
                return done % every == 0 or done == stop

            if due(run.log_every) or due(run.save_every):
                loss = log.flush(done, **norm, lr=run.optimizer.param_groups[0]["lr"])
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if run.validate and due(run.validate_every):
                metrics = run.validate()
                log.write(done, {f"validation/{name}": value for name, value in metrics.items()})
                if run.select:
                    run.offer(done, metrics)
            if due(run.save_every):
                run.save(done)
            bar.update()


def attention(device: torch.device) -> AbstractContextManager:
    """Attention of training. On a CPU the plain one: with the backward of the fused one a step takes half as long again
    or twice as long where there are as few tokens as in the bundled models.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _step(run: Run, batches: Iterator[dict[str, Any]], step: int, log: "_Log") -> dict[str, torch.Tensor]:
    """One step of the optimizer; returns the "norm" of the gradient before clipping, where it is clipped."""
    fabric = run.fabric
    run.model.train()
    for part in range(run.accumulate):
        batch = next(batches, None)
        assert batch is not None, f"the batches ended at step {step} of {run.steps}"
        number = step * run.accumulate + part
        torch.manual_seed((run.seed * 1_000_003 + number) * fabric.world_size + fabric.global_rank)
        unfinished = part + 1 < run.accumulate
        # Over the backward, too: checkpointed blocks compute their attention again there.
        with fabric.no_backward_sync(run.model, enabled=unfinished), attention(fabric.device):
            losses = run.model(**fabric.to_device(batch))
            fabric.backward(losses["loss"] / run.accumulate)
        log.add(losses)
    if run.hold is not None:
        run.hold.before_step()
    norm = {}
    if run.clip_norm:
        options = {"max_norm": run.clip_norm, "error_if_nonfinite": False}
        norm = {"norm": fabric.clip_gradients(run.model, run.optimizer, **options)}
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


class _Log:
    """Losses are averaged between two flushes, and over the ranks."""

    def __init__(self, fabric: Any, loggers: Sequence[Logger]):
        self.fabric, self.loggers = fabric, loggers
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, step: int, **extra: float | torch.Tensor) -> float:
        """Write the means of what was added since the last time; returns the loss. UserError unless it is finite."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        if self.fabric.world_size > 1:
            local = torch.tensor(list(means.values()), device=self.fabric.device)
            means = dict(zip(means, self.fabric.all_reduce(local, reduce_op="mean").tolist(), strict=True))
        self.sums, self.counts = {}, {}
        self.write(step, means | {name: float(value) for name, value in extra.items()})
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is {means['loss']} at step {step}: try a lower lr, or --precision 32-true")
        return means["loss"]

    def write(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.write(step, values)
