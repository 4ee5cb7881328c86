"""The training loop of every script."""

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine.checkpoint import load_checkpoint, save_checkpoint


@dataclass
class Run:
    """What a run is made of; `fit` moves it forward.

    rate: factor of each parameter group's peak learning rate at a step. identity: the configuration, as plain values; a
    checkpoint of another one is refused. validate: called every `validate_every` steps, returns metrics for the log.
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
        """Load the checkpoint of an earlier run in the same folder, if there is one; returns the first step to do."""
        if not self.checkpoint_path.is_file():
            return 0
        state = load_checkpoint(self.checkpoint_path)
        if state["identity"] != self.identity:
            changed = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
            raise ValueError(
                f"{self.checkpoint_path}: belongs to a run of another configuration (differs in "
                f"{', '.join(changed) or 'its keys'}); choose another --output_dir"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write the checkpoint after `step` steps; the ranks wait for the one that writes."""
        if self.fabric.is_global_zero:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            save_checkpoint(self.checkpoint_path, {"step": step, "identity": self.identity, **state})
        self.fabric.barrier()


def fit(run: Run, batches: Iterable[dict[str, Any]], start: int) -> None:
    """Train from step `start` to `run.steps` on `batches`, each the keyword arguments of one `model(...)` call.

    All randomness of a step is seeded by (seed, step, rank), so a resumed run equals an uninterrupted one.
    """
    fabric, world = run.fabric, run.fabric.world_size
    log = _Log(run.output_dir / "log.csv", fabric.is_global_zero, start)
    bar = tqdm(total=run.steps, initial=start, desc="training", disable=not fabric.is_global_zero, mininterval=2.0)
    peaks = [group.setdefault("peak", group["lr"]) for group in run.optimizer.param_groups]
    step = start
    for step, batch in enumerate(batches, start):
        torch.manual_seed((run.seed * 1_000_003 + step) * world + fabric.global_rank)
        for group, peak in zip(run.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * run.rate(step)
        run.model.train()
        losses = run.model(**batch)
        fabric.backward(losses["loss"])
        norm = fabric.clip_gradients(run.model, run.optimizer, max_norm=run.clip_norm, error_if_nonfinite=False)
        run.optimizer.step()
        run.optimizer.zero_grad()

        done = step + 1
        log.add(losses)
        if done % run.log_every == 0 or done == run.steps:
            row = log.flush(done, norm=float(norm), lr=run.optimizer.param_groups[0]["lr"])
            bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
        if run.validate and (done % run.validate_every == 0 or done == run.steps):
            log.write({"step": done, **run.validate()})
        if done % run.save_every == 0 or done == run.steps:
            run.save(done)
        bar.update()
    bar.close()


class _Log:
    """CSV of (step, seconds, name, value); losses are averaged between two flushes."""

    def __init__(self, path: Path, active: bool, start: int):
        self.path, self.active, self.begin = path, active, time.monotonic()
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in self._rows() if int(row[0]) <= start]  # a killed run logged beyond its checkpoint
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["step", "seconds", "name", "value"], *kept])
            self.begin -= float(kept[-1][1]) if kept else 0.0

    def _rows(self) -> list[list[str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in list(csv.reader(file))[1:] if len(row) == 4]

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        self.write({"step": step, **means, **extra})
        return means

    def write(self, row: dict[str, float]) -> None:
        if self.active:
            seconds = f"{time.monotonic() - self.begin:.0f}"
            with self.path.open("a", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([row["step"], seconds, k, f"{v:.6g}"] for k, v in row.items() if k != "step")
