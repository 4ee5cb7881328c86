"""Recovery: everything that pruning has kept is trained, without labels, towards the outputs of the dense model.

Weights that are kept, biases, norms, embeddings: whatever parameter the outputs depend on is trained, the masks are
held, and nothing is drawn at random in the model (dropout is off). The best weights by the loss on held-out samples are
the result; those at the start are among them, so that the result is never worse than the start on these.
"""

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.contents import contents
from engine.options.recovery import RecoveryOptions, recovery_options, usual_lr
from engine.ranks import on_leader, summed
from engine.sparse_training.distillation import distillation
from engine.sparse_training.held import Held
from engine.training.fit import Run, fit
from engine.training.optimizer import adamw
from engine.training.schedule import warmup_cosine
from sparsity.errors import UserError
from sparsity.masks import Masks, state_digest
from sparsity.run.memory import Memory, lacking
from sparsity.view import PrunableView, accelerators, canonical

HELD_BATCHES = 32  # of each kind of data, on all ranks: what a validation reads
VALIDATIONS = 10  # in a run, besides that of the start
BETAS = (0.9, 0.999)
SETTINGS = ("precision", "devices", "num_nodes", "tf32", "deterministic", "num_batches")  # numbers depend on them
CHECKPOINTS = ("last.pt", "best.pt")
LOSS, SELECT = "loss", "minus_loss"  # the highest value is the best


class Batches(Protocol):
    """This rank's calibration batches. samples, batches_in_round: on all ranks, the former in `unit`."""

    unit: str
    samples: int
    batches_in_round: int

    def __iter__(self) -> Iterator[Any]: ...

    def stream(self, start: int = 0) -> Iterator[Any]:
        """Yield the batches of epoch after epoch, without end and without the first `start`."""
        ...


class Splittable(Protocol):
    """Calibration data as a `engine.pruning.data_kinds.Subject` has it."""

    def split(self, seed: int, most: int) -> tuple[Batches, Batches]:
        """Return the data without a tenth of its samples, and that tenth: at most `most` batches of each kind."""
        ...


class Student(nn.Module):
    """Wrap the student: `model(batch)` is the distillation loss against `teacher`, with its terms."""

    def __init__(self, view: PrunableView):
        super().__init__()
        self.model = view.model
        self.teachers: list[nn.Module] = []  # a list, so that it is neither trained nor saved
        self._view = view

    def forward(self, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            wanted = self._view.outputs(batch, *self.teachers)
        return distillation(self._view.outputs(batch), wanted)

    def train(self, mode: bool = True) -> "Student":
        """Without dropout and the statistics of batches: the teacher has neither."""
        return super().train(False)


@dataclass(frozen=True)
class Recovered:
    """The outcome for one set of masks, of which the model has the weights.

    trained: state-dict keys of what was trained. before, after: the held-out loss of the start and of the best weights,
    those after `step` steps. seconds: that it took.
    """

    trained: tuple[str, ...]
    before: float
    after: float
    step: int
    seconds: float


class Recovery:
    """Recovers the masks of a run, one set after the other.

    data: the calibration data, of which a tenth of the samples is held out. config: a dataclass that says what that
    reads. settings: of the run, as plain values, on which its numbers depend.
    """

    def __init__(
        self,
        options: RecoveryOptions,
        fabric: Any,
        view: PrunableView,
        data: Splittable,
        config: Any,
        *,
        seed: int,
        settings: dict[str, Any],
    ):
        self.options, self.fabric, self.view, self.seed = options, fabric, view, seed
        self.lr = options.lr or usual_lr([weight.shape[1] for weight in view.weights.values()])
        self.rest, self.held = data.split(seed, HELD_BATCHES)
        self._config, self._settings = config, settings
        self._student: Any = None
        self._folders: list[Path] = []

    @property
    def told(self) -> str:
        """Describe the recovery, for the report."""
        batches = self.options.rounds * self.rest.batches_in_round
        held, every = self.held.samples, self.held.samples + self.rest.samples
        return (
            f"{self.options.steps} steps of {batches} batches, lr {self.lr:.3g}; {held} of {every}"
            f" {self.held.unit} held out (seed {self.seed}), by whose loss the best weights are chosen"
        )

    @contextmanager
    def recovered(self, masks: Masks, folder: Path) -> Iterator[Recovered]:
        """The model inside the block has the recovered weights; afterwards it is dense again, to the bit.

        folder: of the checkpoints and the log; what a killed run has left there is gone on from.
        """
        begin, view = time.perf_counter(), self.view
        teacher = copy.deepcopy(view.model).eval().requires_grad_(False)
        try:
            with torch.random.fork_rng(accelerators(next(iter(view.weights.values())).parameter)):
                run = self._run(masks, folder, teacher)
                before = self._train(run)
            best = run.best or {}
            yield Recovered(
                self._trained(run.optimizer.optimizer),
                before,
                -best["value"],
                int(best["step"]),
                time.perf_counter() - begin,
            )
        finally:
            view.model.load_state_dict(teacher.state_dict())
            view.model.zero_grad()  # of an interrupted step
            if self._student is not None:
                self._student.module.teachers.clear()

    def _run(self, masks: Masks, folder: Path, teacher: nn.Module) -> Run:
        """Return a run that starts from the pruned weights, and put these into the model."""
        fabric, options = self.fabric, self.options
        dense = state_digest(teacher)
        optimizer = adamw(
            self.view.model,
            lr=self.lr,
            weight_decay=0.0,
            betas=BETAS,
            fused=self._settings["precision"] != "16-mixed",
        )
        hold = Held(self.view, optimizer, masks)
        identity = self._identity() | {"dense": dense, "pruned": state_digest(self.view.model)}
        if self._student is None:  # once: ranks would else reduce each gradient several times
            self._student = fabric.setup_module(Student(self.view))
        self._student.module.teachers[:] = [teacher]
        self._folders.append(folder)
        return Run(
            fabric=fabric,
            model=self._student,
            optimizer=fabric.setup_optimizers(optimizer),
            rate=partial(warmup_cosine, total=options.steps, warmup=round(options.warmup * options.steps)),
            steps=options.steps,
            output_dir=folder,
            identity=identity,
            seed=self.seed,
            save_every=options.save_every,
            validate_every=-(-options.steps // VALIDATIONS),
            validate=self._validate,
            select=SELECT,
            accumulate=options.rounds // fabric.world_size * self.rest.batches_in_round,
            hold=hold,
        )

    def _identity(self) -> dict[str, Any]:
        config = self._config
        read = {name: getattr(config, name) for name in config.CALIBRATION}
        held = self.fabric.broadcast(on_leader(self.fabric, partial(contents, config)))
        return {
            "recovery": {name: getattr(self.options, name) for name in ("steps", "warmup", "rounds")} | {"lr": self.lr},
            "data": json.loads(json.dumps([read, held], default=_plain)),
            "samples": [self.rest.samples, self.held.samples],
            "seed": self.seed,
            **self._settings,
        }

    def _train(self, run: Run) -> float:
        """Train to the end and bring the best weights back; returns the held-out loss of the start."""
        first = self._validate()
        start = run.resume()
        if not start:
            run.offer(0, first)
        if start < run.steps or run.unvalidated:
            fit(run, ({"batch": batch} for batch in self.rest.stream(start * run.accumulate)), start)
        run.load_best()
        return first[LOSS]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Return the mean loss of the held-out batches, over all ranks, at the precision of the run."""
        student, total, count = self._student.module, 0.0, 0
        with self.fabric.autocast():
            for batch in self._progress(self.held):
                total += float(student(self.fabric.to_device(batch))["loss"])
                count += 1
        total, count = summed(self.fabric, torch.tensor([total, count], dtype=torch.float64)).tolist()
        if not total < float("inf"):
            raise UserError(f"the distillation loss of held-out samples is {total}: try --precision 32-true")
        return {LOSS: total / count, SELECT: -total / count}

    def _progress(self, batches: Iterable[Any]) -> Iterable[Any]:
        quiet = not self.fabric.is_global_zero
        return tqdm(batches, desc="held-out loss", unit="batch", leave=False, disable=quiet)

    def _trained(self, optimizer: Any) -> tuple[str, ...]:
        """The parameters that the outputs depend on, and all prunable ones, under all their names."""
        moved = {id(parameter) for parameter in optimizer.state}
        moved |= {id(weight.parameter) for weight in self.view.weights.values()}
        named = self.view.model.named_parameters(remove_duplicate=False)
        return tuple(canonical(name) for name, parameter in named if id(parameter) in moved)

    def forget(self) -> None:
        """Remove the checkpoints, once all results are written; the logs stay."""
        for path in (folder / name for folder in self._folders for name in CHECKPOINTS):
            path.unlink(missing_ok=True)


def needed_memory(view: PrunableView) -> Memory:
    """Return what recovery takes beside the model and its activations: the dense model, gradients, two moments."""
    copies = 4 * sum(parameter.numel() * parameter.element_size() for parameter in view.model.parameters())
    return Memory(0, copies) if not view.accelerators else Memory(copies, 0)


def build_recovery(
    args: argparse.Namespace, fabric: Any, view: PrunableView, data: Any, config: Any, free: Memory
) -> Recovery | None:
    """Return what `--recover` asks for, of the arguments of prune.py; None where it does not.

    data, config: see `Recovery`. free: bytes before the run. Raises UserError where they are too few.
    """
    options = recovery_options(args)
    if options is None:
        return None
    if told := lacking(needed_memory(view), free):
        raise UserError(f"--recover needs {told}: leave it out, or use a machine with more memory")
    settings = {name: getattr(args, name) for name in SETTINGS}
    return Recovery(options, fabric, view, data, config, seed=args.seed, settings=settings)


def _plain(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else str(value)
