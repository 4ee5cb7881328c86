"""The training loop of every script."""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine.checkpoint import differences, load_checkpoint, save_checkpoint
from engine.files import remove_leftovers, write_atomic


@dataclass
class Run:
    """What a run is made of; `fit` moves it forward.

    rate: factor of each parameter group's peak learning rate at a step. identity: what the run depends on, as plain
    values; a checkpoint of another one is refused. validate: called every `validate_every` steps on every rank, returns
    metrics for the log, as validation/<name>.
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

    @property
    def checkpoint_path(self) -> Path:
        return self.output_dir / "last.pt"

    def resume(self) -> int:
        """Load the checkpoint of an earlier run in the same folder, if there is one; returns the first step to do.

        Raises ValueError where the checkpoint cannot be read or belongs to a run of another configuration.
        """
        if not self.checkpoint_path.is_file():
            return 0
        state = load_checkpoint(self.checkpoint_path, ("step", "identity", "model", "optimizer", "precision"))
        changed = differences(state["identity"], self.identity)
        if changed:
            raise ValueError(
                f"{self.checkpoint_path}: belongs to a run of another configuration ({'; '.join(changed)}); choose "
                "another --output_dir, or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps; the ranks wait for the one that writes."""
        if self.fabric.is_global_zero:
            remove_leftovers(self.checkpoint_path)
            state = {
                "step": step,
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
            }
            save_checkpoint(self.checkpoint_path, state)
        self.fabric.barrier()


def fit(run: Run, batches: Iterable[dict[str, Any]], start: int) -> None:
    """Train from step `start` to `run.steps` on `batches`, each the keyword arguments of one `model(...)` call.

    All randomness of a step is seeded by (seed, step, rank), so a resumed run equals an uninterrupted one. Raises
    ValueError when the loss is no longer finite, before that is saved.
    """
    fabric = run.fabric
    log = _Log(run.output_dir / "log.csv", fabric.is_global_zero, start)
    peaks = [group.setdefault("peak", group["lr"]) for group in run.optimizer.param_groups]
    done = start
    with tqdm(total=run.steps, initial=start, desc="training", disable=not fabric.is_global_zero, mininterval=2) as bar:
        for step, batch in zip(range(start, run.steps), batches, strict=False):
            torch.manual_seed((run.seed * 1_000_003 + step) * fabric.world_size + fabric.global_rank)
            for group, peak in zip(run.optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * run.rate(step)
            losses, norm = _step(run, fabric.to_device(batch))
            log.add(losses)
            done = step + 1

            def due(every: int, done: int = done) -> bool:
                return done % every == 0 or done == run.steps

            if due(run.log_every) or due(run.save_every):
                loss = log.flush(done, norm=float(norm), lr=run.optimizer.param_groups[0]["lr"])
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if run.validate and due(run.validate_every):
                log.write({"step": done, **{f"validation/{k}": v for k, v in run.validate().items()}})
            if due(run.save_every):
                run.save(done)
            bar.update()
    assert done == run.steps, f"the batches ended at step {done} of {run.steps}"


def _step(run: Run, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One step of the optimizer; returns the losses and the norm of the gradient before clipping."""
    run.model.train()
    losses = run.model(**batch)
    run.fabric.backward(losses["loss"])
    norm = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=run.clip_norm, error_if_nonfinite=False)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return {name: value.detach() for name, value in losses.items()}, norm


class _Log:
    """CSV of (step, seconds, name, value); losses are averaged between two flushes."""

    HEADER = ("step", "seconds", "name", "value")

    def __init__(self, path: Path, active: bool, start: int):
        self.path, self.active, self.begin = path, active, time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        if active:
            kept = [row for row in self._rows() if int(row[0]) <= start]  # a killed run logged beyond its checkpoint
            write_atomic(path, _csv([self.HEADER, *kept]).encode())
            self.begin -= float(kept[-1][1]) if kept else 0.0

    def _rows(self) -> list[list[str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.reader(file) if len(row) == len(self.HEADER) and row[0].isdigit()]

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, step: int, **extra: float) -> float:
        """Write the means of what was added since the last time; returns the loss. ValueError unless it is finite."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        self.write({"step": step, **means, **extra})
        if not math.isfinite(means["loss"]):
            raise ValueError(f"the loss is {means['loss']} at step {step}: try a lower lr, or --precision 32-true")
        return means["loss"]

    def write(self, row: dict[str, float]) -> None:
        if self.active:
            seconds = f"{time.monotonic() - self.begin:.0f}"
            with self.path.open("a", newline="") as file:
                file.write(_csv([row["step"], seconds, k, f"{v:.6g}"] for k, v in row.items() if k != "step"))


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
