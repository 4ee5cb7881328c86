"""Fine-tuning of a task model, pruned or dense: everything between building it and its results."""

import dataclasses
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from configs.loading import read_yaml, save_config
from configs.task import TaskConfig
from datasets.calibration.data_kinds import clear_skipped, skipped_path
from datasets.collate import SkippedImages, collate
from datasets.loaders import loader
from engine.contents import classes, contents
from engine.export import save_weights
from engine.options.sparse_training import sparse_options
from engine.ranks import on_leader, place_of
from engine.recipes.expand import Recipe
from engine.reports.model_card import model_card
from engine.sparse_training.training import SparseTraining
from engine.training.fit import Run, fit
from engine.training.loggers import Logger, TensorBoardLog, WandbLog
from engine.training.optimizer import after_each_step, optimizer_of
from engine.training.schedule import warmup_cosine, warmup_linear
from engine.updated_weights import warn_of_updates
from sparsity.errors import UserError
from sparsity.files import clear_leftovers, write_atomic
from sparsity.masks import Masks
from sparsity.view import PrunableView

log = logging.getLogger(__name__)

CARD = "README.md"  # of the results: what is written last
RATES = {"linear": warmup_linear, "cosine": warmup_cosine}
Metrics = dict[str, float]


def save_task_weights(model: nn.Module, folder: Path) -> None:
    save_weights(model, folder / "model.safetensors")


class Finetuning:
    """A task model in training: its mask, optimizer, steps, logs and results.

    args: of `engine.options.command_line.add_finetuning_options`, prepared by `engine.options.finetuning.prepare`.
    task: module of the task model, see models/parts/task_model.py. model: as its `build` makes it; with a mask, its
    weights are zero from here on. sizes: what it was built from, a dataclass. train: indexed by running numbers, see
    `datasets.sampler.ResumableSampler`. gather: items to a batch. read: `train` to batches, as
    `datasets.loaders.loader` does it.
    """

    def __init__(
        self,
        args: Namespace,
        config: TaskConfig,
        fabric: Any,
        task: ModuleType,
        model: nn.Module,
        sizes: Any,
        train: Dataset,
        gather: Callable[[list[Any]], dict[str, Any]] = collate,
        read: Callable[..., Iterable[dict[str, Any]]] = loader,
        save: Callable[[nn.Module, Path], None] = save_task_weights,
    ):
        self.args, self.config, self.fabric, self.model = args, config, fabric, model
        self.train, self.gather, self.read, self.save = train, gather, read, save
        self.title = "_".join(task.__name__.split(".")[1:])
        self.view = task.prunable_view(model)
        masks = read_masks(args.mask, self.view, task.task_names, model.heirs) if args.mask else None
        self.sparse = SparseTraining(
            sparse_options(args), self.view, (*task.NEW, *model.new), args.seed, fabric.device, model
        )
        if masks:
            warn_of_updates(masks, self.view, args.mask)
            masks.apply(self.view)
        model.on_pruned()
        if config.gradient_checkpointing:
            checkpoint_blocks(model.blocks())
        optimizer = optimizer_of(self.sparse.parameters(), config.optimizer, (*task.NEW, *model.new), args.precision)
        wrapped, wrapped_optimizer = fabric.setup(self.sparse.module(), optimizer)
        self.epoch_steps = config.steps_per_epoch(len(train), args.debug)
        steps = self.epoch_steps * config.scheduler.epochs
        hold = self.sparse.held(optimizer, masks, steps)
        for follow in (hold.after_step, model.on_step):  # copies follow the weights that the model computes with
            after_each_step(optimizer, follow)
        self.run = Run(
            fabric=fabric,
            model=wrapped,
            optimizer=wrapped_optimizer,
            rate=partial(rate, config, steps),
            steps=steps,
            output_dir=args.output_dir,
            identity=self._identity(sizes, masks),
            seed=args.seed,
            clip_norm=config.clip_norm,
            log_every=config.log_every,
            save_every=config.save_every or self.epoch_steps,
            validate_every=self.epoch_steps,
            accumulate=config.accumulation(fabric.world_size),
            hold=hold,
            snapshot=args.snapshot,
        )

    @property
    def masks(self) -> Masks | None:
        """The masks of now; None where the model is dense."""
        return self.run.hold.masks if self.run.hold else None

    def _identity(self, sizes: Any, masks: Masks | None) -> dict[str, Any]:
        given = {name: getattr(self.args, name) for name in ("seed", "precision", "devices", "num_nodes", "debug")}
        given |= {name: getattr(self.args, name) for name in ("tf32", "deterministic")}
        mask = masks.digest() if masks else None
        sparse = self.sparse.options.given
        given |= {"sparse training": sparse} if sparse else {}
        parts = {"model": dataclasses.asdict(sizes), "training": self.config.identity(), "mask": mask}
        read = self.fabric.broadcast(on_leader(self.fabric, partial(contents, self.config, sparse)))
        labels = getattr(self.train, "class_names", None)
        data = {"samples": len(self.train)} if labels is None else classes(labels, len(self.train))
        return {"task": self.title, **parts, "contents": {**read, "training set": data}, **given}

    def fit(self, validate: Callable[[], Metrics] | None = None, select: str | None = None) -> bool:
        """Train on from the snapshot; whether all epochs are done, since `--incremental` does one.

        validate: called after each epoch, but for `--skip_eval`. select: its metric that says which weights are the
        best; the last ones are where None. With `--evaluate` nothing is trained.
        """
        run, epochs = self.run, self.config.scheduler.epochs
        if not run.checkpoint_path.is_file():
            clear_skipped(self.args.output_dir, place_of(self.fabric))
        if validate is not None and not self.args.skip_eval:
            run.validate, run.select = partial(self.evaluate, validate), select
        start = run.resume()
        if self.args.evaluate:
            self._tell_what_is_evaluated(start)
            return True
        stop = (
            min(run.steps, (start // self.epoch_steps + 1) * self.epoch_steps) if self.args.incremental else run.steps
        )
        if start < stop or (run.unvalidated and run.validate):
            run.loggers = on_leader(self.fabric, partial(self._begin, start)) or ()
            fit(run, self._batches(start, stop), start, stop)
        if stop < run.steps:
            self._close({})
            if self.fabric.is_global_zero:
                print(f"epoch {stop // self.epoch_steps} of {epochs} is done; the same command does the next")
        return stop == run.steps

    def _tell_what_is_evaluated(self, start: int) -> None:
        best, path = self.run.best, self.run.checkpoint_path
        what = f"{path}, after step {start} of {self.run.steps}" if start else f"{self.origin}, as it is"
        log.info("evaluating %s", f"{self.run.best_path}, of step {best['step']:g}" if best else what)

    def evaluate(self, evaluation: Callable[[], Metrics]) -> Metrics:
        """Its metrics, computed at the precision of the run."""
        with self.fabric.autocast():
            return evaluation()

    def finish(self, tests: Mapping[str, Callable[[], Metrics]], unscored: Iterable[Callable[[], Any]] = ()) -> None:
        """Evaluate the best weights and write `<output_dir>/result/`: weights with zeros, mask, metrics, model card.

        unscored: what `--skip_eval` does in place of the tests. A run that was finished before is left as it is, unless
        `--evaluate` is given.
        """
        done = None if self.args.evaluate else self.fabric.broadcast(on_leader(self.fabric, partial(self._done, tests)))
        if done is not None:
            self._close({})
            if self.fabric.is_global_zero:
                print(f"this run is finished; --evaluate evaluates it again\n{self._told(done)}")
            return
        self.run.load_best()
        for produce in unscored if self.args.skip_eval else ():
            self.evaluate(produce)
        metrics = {} if self.args.skip_eval else {name: self.evaluate(test) for name, test in tests.items()}
        self._close(metrics)
        folder = on_leader(self.fabric, partial(self._write, metrics))
        if folder is not None:
            print(self._told(metrics))
        self.fabric.barrier()

    @property
    def origin(self) -> str:
        """Return what training began with."""
        return self.model.told_source(self.config.weights)

    @property
    def _results(self) -> Path:
        return self.args.output_dir / "result"

    def _told(self, metrics: Mapping[str, Metrics]) -> str:
        lines = [f"{test}: {', '.join(f'{k} {v:.1f}' for k, v in found.items())}" for test, found in metrics.items()]
        return "\n".join([*lines, f"results: {self._results}"])

    def _done(self, tests: Collection[str]) -> dict[str, Metrics] | None:
        """The metrics of these tests, where the results of this very run are there and whole."""
        folder, wanted = self._results, () if self.args.skip_eval else tests
        if not (folder / CARD).is_file():  # what is written last
            return None
        try:
            settings, metrics = read_yaml(folder / "config.yaml"), json.loads((folder / "metrics.json").read_bytes())
        except (UserError, ValueError, OSError):
            return None
        return metrics if settings.get("run") == self.run.digest and set(wanted) <= set(metrics) else None

    def _write(self, metrics: Mapping[str, Metrics]) -> Path:
        folder = self._results
        clear_leftovers(folder)
        (folder / CARD).unlink(missing_ok=True)
        self.save(self.model, folder)
        if self.masks:
            self.masks.save(folder / "mask.safetensors")
        write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
        self.args.recipe.save(folder, self.args.mask, without=("evaluate",))  # of a run that is done
        save_config({**self._settings(), "run": self.run.digest}, folder / "config.yaml")
        best, epochs = self.run.best, self.config.scheduler.epochs
        facts = {"base model": self.origin, "task": self.title, "epochs": epochs}
        facts |= {"weights of epoch": best["step"] / self.epoch_steps} if best else {}
        facts |= self.sparse.facts()
        facts |= {name: getattr(self.args, name) for name in ("seed", "precision")}
        card = model_card(self.title, facts, self.masks, self.view, metrics, self.args.command)
        write_atomic(folder / CARD, card.encode())
        return folder

    def _settings(self) -> dict[str, Any]:
        arguments = {name: str(v) if isinstance(v, Path | Recipe) else v for name, v in vars(self.args).items()}
        return {"arguments": arguments, "config": dataclasses.asdict(self.config)}

    def _begin(self, start: int) -> list[Logger]:
        """Write the configuration; the loggers of a run from step `start` on."""
        args, wandb, loggers = self.args, self.config.wandb_data, []
        save_config(self._settings(), args.output_dir / "config.yaml")
        if args.wandb:
            named = {"project": wandb.project, "name": args.experiment_name or wandb.name, "tags": wandb.tags}
            loggers.append(WandbLog(args.output_dir, **named, offline=args.wdb_offline, config=self._settings()))
        if args.tensorboard:
            loggers.append(TensorBoardLog(args.output_dir, start))
        return loggers

    def _close(self, metrics: Mapping[str, Metrics]) -> None:
        """The last that the loggers get: the metrics of each test."""
        values = {f"{test}/{name}": value for test, found in metrics.items() for name, value in found.items()}
        for logger in self.run.loggers:
            logger.write(self.run.steps, values)
            logger.close()

    def _batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield what the model is called with in the steps from `start` to `stop`, on this rank.

        Raises UserError where too many images cannot be read, or none of a batch.
        """
        config, fabric, parts = self.config, self.fabric, self.run.accumulate
        order = {"seed": self.args.seed, "start": start * parts, "stop": stop * parts, "workers": config.workers}
        batches = self.read(self.train, config.batch_size_train, self.gather, place=place_of(fabric), **order)
        epoch = self.epoch_steps * parts
        path = skipped_path(self.args.output_dir, fabric.global_rank)
        skipped = SkippedImages(path, epoch * config.batch_size_train, config.max_skipped)
        for number, batch in enumerate(batches, start * parts):
            skipped.count = skipped.count if number % epoch else 0
            skipped.add(batch.pop("skipped", ()))
            if not batch:
                raise UserError(f"{path}: no image of a batch could be read; get these images again")
            yield {"batch": batch, "epoch": number / epoch}


def rate(config: TaskConfig, steps: int, step: int) -> float:
    """Factor of the peak rate at a step."""
    schedule, optimizer = config.scheduler, config.optimizer
    floor = optimizer.min_lr / optimizer.lr if optimizer.lr else 0.0
    return RATES[schedule.sched](step, steps, int(steps * schedule.num_warmup_steps), floor)


def read_masks(
    path: Path,
    view: PrunableView,
    task_names: Callable[[str], Sequence[str]],
    heirs: Callable[[str], Sequence[str]] = lambda name: (),
) -> Masks:
    """The masks of a file, of the pretrained model or of the task's, under the names that the task model has; its
    `heirs` take the masks of the weights that they are copies of, unless the file has masks of their own.

    Raises UserError, naming the file and the first names, where they are another model's.
    """
    loaded = Masks.load(path)
    keys = [
        (key, mask) for name, mask in loaded.items() for key in dict.fromkeys((name, *loaded.aliases.get(name, ())))
    ]
    named = [(new, mask) for key, mask in keys for new in task_names(key)]
    inherited = {heir: mask for new, mask in named for heir in heirs(new)}
    renamed = Masks(inherited | dict(named), loaded.provenance)
    try:
        resolved = renamed.resolve(view)
    except ValueError as error:
        raise UserError(f"--mask {path}: {error}") from error
    return Masks(resolved, loaded.provenance, view.aliases)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Have each block compute its forward pass again in the backward pass, instead of keeping what is in between."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
