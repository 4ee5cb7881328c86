"""The training loop of every script."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from engine import stopping
from engine.ranks import Agreement, on_leader
from engine.sparse_training.held import Held
from engine.training.checkpoint import differences, load_checkpoint, plain, save_checkpoint
from engine.training.finite import TRY, check_finite
from engine.training.loggers import VALIDATION, CsvLog, Logger
from sparsity.errors import MissingFileError, UserError
from sparsity.files import remove_leftovers


@dataclass
class Run:
    """A run in training; `fit` moves it forward.

    rate: factor of each parameter group's peak learning rate at a step. identity: what the run depends on, as plain
    values; a checkpoint of another one is refused. clip_norm: of the gradient; 0 does not clip. validate: called every
    `validate_every` steps on every rank, returns metrics for the log, as validation/<name>. select: the metric whose
    highest value says which weights are the best, of those under the last mask. accumulate: batches of a step. hold:
    keeps pruned weights at zero, and prunes on the way. snapshot: the checkpoint; default last.pt in `output_dir`.
    loggers: of rank 0, besides log.csv. best: where the best weights are from. unvalidated: the checkpoint was saved
    before a validation that is not done.
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
    hold: Held | None = None
    snapshot: Path | None = None
    loggers: Sequence[Logger] = ()
    best: dict[str, float] | None = None  # {"step", "value"} of the best weights so far
    unvalidated: bool = False

    @property
    def checkpoint_path(self) -> Path:
        return self.snapshot or self.output_dir / "last.pt"

    @property
    def digest(self) -> str:
        """Return the digest of the identity."""
        return hashlib.sha256(json.dumps(plain(self.identity), sort_keys=True).encode()).hexdigest()

    @property
    def best_path(self) -> Path:
        return self.output_dir / "best.pt"

    BEST_KEYS = ("metrics", "model")

    def resume(self) -> int:
        """Load the checkpoint of an earlier run in the same folder, if there is one; returns the first step to do.

        Raises UserError where the checkpoint cannot be read or belongs to a run of another configuration.
        """
        if not self.checkpoint_path.is_file():
            return 0
        state = load_checkpoint(self.checkpoint_path, ("step", "identity", "model", "optimizer", "precision"))
        own = plain(self.identity)
        if "unvalidated" not in state:  # of version 0.1, which knew less of what a run depends on
            own = {key: value for key, value in own.items() if key in state["identity"]}
        changed = differences(state["identity"], own)
        if changed:
            raise UserError(
                f"{self.checkpoint_path}: belongs to a run of another configuration ({'; '.join(changed)}); choose "
                "another --output_dir, or delete it"
            )
        self.best, self.unvalidated = state.get("best"), state.get("unvalidated", False)
        if self.best:
            self._read_best((self.best["step"], *((state["step"],) if self.unvalidated else ())))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.hold is not None:
            self.hold.load_state_dict(state.get("hold", {}))
        self._verify()
        return int(state["step"])

    def _read_best(self, steps: Collection[int]) -> dict[str, Any]:
        """The best weights, with where they are from; UserError unless they are of this run, after one of `steps`."""
        if not self.best_path.is_file():
            raise MissingFileError(f"{self.best_path}: not found, and {self.checkpoint_path} goes with it")
        state = load_checkpoint(self.best_path, self.BEST_KEYS)
        own = plain(self.identity)  # not in files of version 0.1
        if state.get("identity", own) != own or state.get("step", min(steps)) not in steps:
            raise UserError(
                f"{self.best_path}: holds the weights of another run, or of another step than {self.checkpoint_path} "
                "says; choose another --output_dir, or delete both to begin anew"
            )
        return state

    def save(self, step: int, unvalidated: bool = False) -> None:
        """Write the checkpoint after `step` steps; the ranks wait for the one that writes."""
        self._verify(step)
        state = {
            "step": step,
            "identity": plain(self.identity),
            "unvalidated": unvalidated,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
            "best": self.best,
            "hold": {} if self.hold is None else self.hold.state_dict(),
        }
        on_leader(self.fabric, partial(self._write, self.checkpoint_path, state))

    def offer(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the weights of now as the best ones if they are, by the metric `select`."""
        value = metrics[self.select]
        if self.best is None or value > self.best["value"]:
            self._verify(step)
            self.best = {"step": step, "value": value}
            on_leader(self.fabric, partial(self._keep_best, step, metrics))

    def _keep_best(self, step: int, metrics: dict[str, float]) -> None:
        state = {"step": step, "identity": plain(self.identity), "metrics": metrics, "model": self.model.state_dict()}
        self._write(self.best_path, state)

    def load_best(self) -> None:
        """Bring the best weights back, where a metric selected them."""
        if self.best is not None:
            self.model.load_state_dict(self._read_best((self.best["step"],))["model"])
            self._verify()

    def validated(self, step: int) -> dict[str, float]:
        """The metrics of the weights after `step` steps, which become the best ones if they are.

        Those that a run which was killed after that has left are taken as they are: on a GPU they might come out
        otherwise, and not be those of the best weights any more.
        """
        if self.unvalidated and self.select and self.best_path.is_file():
            found = load_checkpoint(self.best_path, self.BEST_KEYS)
            if found.get("step") == step and found.get("identity") == plain(self.identity):
                self.best = {"step": step, "value": found["metrics"][self.select]}
                on_leader(self.fabric, partial(self._keep_best, step, found["metrics"]))  # perhaps it was half done
                return found["metrics"]
        with stopping.at_once():
            metrics = self.validate()
        if self.select and (self.hold is None or self.hold.settled(step)):
            self.offer(step, metrics)
        return metrics

    def _verify(self, step: int | None = None) -> None:
        """Pruned weights are zero; UserError where something that is to be saved is not finite."""
        if self.hold is not None:
            self.hold.verify()
        if step is not None:
            check_finite(self.model, self.optimizer, f"at step {step}")

    @staticmethod
    def _write(path: Path, state: dict[str, Any]) -> None:
        remove_leftovers(path)
        save_checkpoint(path, state)


def fit(run: Run, batches: Iterable[dict[str, Any]], start: int, stop: int | None = None) -> None:
    """Train from step `start` to `stop`, by default `run.steps`, on `batches`, each the keyword arguments of one
    `model(...)` call, `run.accumulate` of them in a step.

    All randomness of a batch is seeded by (seed, its number, rank), so a resumed run equals an uninterrupted one.
    Raises UserError when the loss is no longer finite, before that is saved, and Stopped after a signal to stop, once
    the step is saved.
    """
    stop = run.steps if stop is None else stop
    leads = run.fabric.is_global_zero
    csv = on_leader(run.fabric, partial(CsvLog, run.output_dir / "log.csv", start, run.unvalidated))
    log, agreement = _Log(run.fabric, [csv, *run.loggers] if leads else []), Agreement(run.fabric)
    if run.unvalidated and run.validate:
        _validate(run, start, log)
    peaks = [group.setdefault("peak", group["lr"]) for group in run.optimizer.param_groups]
    batches = iter(batches)
    bar = tqdm(total=run.steps, initial=start, desc="training", disable=not leads, mininterval=2)
    with bar, stopping.deferred():
        for step in range(start, stop):
            for group, peak in zip(run.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * run.rate(step)
            norm = _step(run, batches, step, log)
            done = step + 1

            def due(every: int, done: int = done) -> bool:
                return done % every == 0 or done == stop

            if due(run.log_every) or due(run.save_every):
                sparsity = {} if run.hold is None else run.hold.sparsity()
                loss = log.flush(done, **norm, **sparsity, lr=run.optimizer.param_groups[0]["lr"])
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            validates, asked = (
                run.validate is not None and due(run.validate_every),
                agreement.any(bool(stopping.asked())),
            )
            if validates or asked or due(run.save_every):
                run.save(done, unvalidated=validates)
            if asked and done < stop:
                raise stopping.Stopped(
                    f"{stopping.asked() or 'a signal'} after step {done} of {run.steps}, saved in {run.checkpoint_path}"
                )
            if validates:
                _validate(run, done, log)
            bar.update()


def _validate(run: Run, done: int, log: "_Log") -> None:
    """Validate after `done` steps, which are saved, and save that."""
    metrics = run.validated(done)
    log.write(done, {f"{VALIDATION}{name}": value for name, value in metrics.items()})
    run.unvalidated = False
    run.save(done)


def attention(device: torch.device) -> AbstractContextManager:
    """Attention of training. On a CPU the plain one: with the backward of the fused one a step takes half as long again
    or twice as long where there are as few tokens as in the bundled models.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _step(run: Run, batches: Iterator[dict[str, Any]], step: int, log: "_Log") -> dict[str, torch.Tensor]:
    """One step of the optimizer; returns the "norm" of the gradient before clipping, where it is clipped."""
    fabric = run.fabric
    if run.hold is not None:
        run.hold.begin_step(step)
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
    if run.hold is not None:  # also where the loss scale of fp16 has skipped the step
        run.hold.after_step()
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
            raise UserError(f"the loss is {means['loss']} at step {step}: {TRY}")
        return means["loss"]

    def write(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.write(step, values)
