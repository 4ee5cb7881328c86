"""The course of a pruning run around its pruner: calibration pass, evaluation of masks, files and tables of results."""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from configs.allocation import save_allocation
from configs.loading import save_config
from datasets.calibration.data_kinds import Calibration
from engine.contents import contents
from engine.export import save_model
from engine.pruning.facts import write_facts
from engine.pruning.free_memory import free_memory, free_on_host
from engine.pruning.recovering import Recovering
from engine.ranks import on_leader, summed
from engine.reports.hub import CARD, card, upload
from engine.reports.pictures import Pictures
from engine.reports.report import DENSE, RECOVERED, Metrics, append_csv, markdown_table, write_report
from engine.reports.sensitivity import error_rows
from engine.tensor_stream import stream_tensors
from sparsity.allocation.given import to_rules
from sparsity.bits import shape_in
from sparsity.errors import UserError
from sparsity.files import write_atomic
from sparsity.masks import Masks
from sparsity.pattern import NM, Block
from sparsity.run.engine import Engine
from sparsity.run.memory import Memory
from sparsity.run.request import Request
from sparsity.solvers.share import check_same
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.gradients import batch_generator
from sparsity.statistics.reading import CalibrationPass, Calibrations
from sparsity.view import PrunableView, canonical

_NOT_PLAIN = r"[^\w.-]+"  # in names of files
RECORDED = ("num_batches", "epochs", "schedule", "lambda_", "row_dtype", "precision")  # options on which masks depend


class _OnDevice:
    """The batches of an epoch on the device, read anew each time that this is iterated over."""

    def __init__(self, data: Calibration, epoch: int, fabric: Any):
        self._data, self._epoch, self._fabric = data, epoch, fabric
        self._length = len(data.at(epoch).numbers)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return (self._fabric.to_device(batch) for batch in self._data.at(self._epoch))


def preflight(
    engine: Engine,
    view: PrunableView,
    request: Request,
    data: Any = None,
    folder: Path | None = None,
    processes: int = 1,
) -> Memory:
    """Return what memory is free. UserError for what this model cannot have or this machine has no memory for, before
    any data is read.

    data: that are read, if any. folder: for what is too large for memory. processes: of this run on this machine.
    """
    rounds = None if data is None else data.rounds
    free = free_memory(view, processes)
    engine.preflight(view, request, rounds=rounds, folder=folder, free=free)
    return free


def calibrations(
    data: Calibration | None,
    fabric: Any,
    seed: int,
    name: str = "",
    folder: Path | None = None,
    config: Any = None,
    capture_budget: int | None = None,
) -> Calibrations:
    """Return what reads the calibration data: epoch -> the pass over its batches, summed over ranks; a pass without
    batches where there is no data.

    What a loss draws is a function of the seed and the batch. name: of the pruner, in the names of files. folder: for
    what is kept for a run that is killed, and what is too large for memory; `config`, a dataclass, then says what is
    read. capture_budget: bytes of captured inputs of blocks that are held in memory; None: half of what is free.
    """

    def epochs(epoch: int) -> CalibrationPass:
        if data is None:
            return CalibrationPass()
        own = data.at(epoch)
        numbers = own.numbers

        def progress(batches: Iterable[Any]) -> Iterable[Any]:
            quiet = not fabric.is_global_zero
            return tqdm(batches, total=len(numbers), desc="calibration", unit="batch", leave=False, disable=quiet)

        scratch = None
        if folder:
            held = fabric.broadcast(on_leader(fabric, partial(contents, config)))
            read = json.dumps([dataclasses.asdict(config), held, seed, epoch, numbers], default=str)
            scratch = Scratch(folder / f"{re.sub(_NOT_PLAIN, '_', name)}_epoch{epoch}_rank{fabric.global_rank}", read)
        return CalibrationPass(
            _OnDevice(data, epoch, fabric),
            progress=progress,
            reduce=partial(summed, fabric) if fabric.world_size > 1 else None,
            generators=lambda i: batch_generator(seed, numbers[i]),
            rounds=own.rounds,
            scratch=scratch,
            arithmetic=partial(_arithmetic, fabric),
            capture_budget=capture_budget or free_on_host() // (2 * fabric.world_size),
            place=(fabric.global_rank, fabric.world_size),
        )

    return epochs


@contextmanager
def _arithmetic(fabric: Any) -> Iterator[None]:
    """The precision of the run, with log lines above the progress bar."""
    with fabric.autocast(), logging_redirect_tqdm():
        yield


def timed(masks: Iterable[tuple[Any, Masks]], together: bool = False) -> Iterator[tuple[Any, Masks, float]]:
    """Return (sparsity, masks, seconds that it took to choose them). together: all are chosen at once, so that each
    took its share.
    """
    begin = time.perf_counter()
    found = list(masks) if together else masks
    share = (time.perf_counter() - begin) / len(found) if isinstance(found, list) and found else None
    begin = time.perf_counter()
    for sparsity, chosen in found:
        yield sparsity, chosen, time.perf_counter() - begin if share is None else share
        begin = time.perf_counter()


def file_name(model: str) -> str:
    """The name of a model as names of files begin: of a folder its last part, and nothing but letters, digits, . and -
    between underscores.
    """
    source, _, rest = model.partition(":")
    rest = Path(os.path.abspath(rest)).name if source == "hf" and Path(rest).is_dir() else rest
    return re.sub(_NOT_PLAIN, "_", f"{source}_{rest}" if rest else source)


def percent(sparsity: Any) -> str:
    """A sparsity in per cent, as files and tables have it."""
    return f"{float(100 * sparsity):.12g}"


class Results:
    """Collects the masks of a run, writes each as soon as it is there, and the report when all are.

    folder: of the results. options: the command line, name -> value; `model`, `pruner`, `seed` and `pattern` name
    the files. config: a dataclass, written beside the results. columns: column of the table -> metric. fabric: of the
    ranks, the first of which writes files; all check that their masks are the same. recovery: where it is set, each set
    of masks is recovered, too.
    """

    recovery: Recovering | None = None
    evaluate: Callable[[], Metrics] | None = None

    def __init__(
        self,
        folder: Path,
        view: PrunableView,
        options: Mapping[str, Any],
        config: Any,
        columns: Mapping[str, str],
        fabric: Any,
    ):
        self.folder, self.view, self.options, self.config = folder, view, options, config
        self.fabric, self.writes = fabric, fabric.is_global_zero
        self.columns = columns
        model = file_name(options["model"])
        block = f"_{options['pattern']}" if isinstance(options["pattern"], Block) else ""
        self.stem = f"{model}_{options['pruner']}{block}"
        self.calibration_seconds, self.read = 0.0, ""
        self.rows: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.pictures = Pictures(folder, view, model, self.stem)
        self.facts: dict[str, str] = {}  # of recovery
        self.warnings: list[str] = []
        self.written: list[Path] = []
        self.errors: dict[str, dict[str, list[float]]] = {}  # of the layers, for each set of masks
        self.uploaded: list[str] = []
        self.preset: dict[str, str] = {}  # what it stood for, where one was given

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def calibration(self, data: Any = None) -> Iterator[None]:
        """Take the time of what is done inside. data: what is read there, with `told`; None: nothing."""
        self.read = data.told if data is not None else ""
        begin = time.perf_counter()
        yield
        self.calibration_seconds = time.perf_counter() - begin

    def dense(self, metrics: Metrics) -> None:
        """The first row: the model before pruning."""
        self.rows.append(self._row(DENSE, dict.fromkeys(self.view.groups, 0.0), 0.0, metrics, seconds="-"))

    def add(self, sparsity: Any, masks: Masks, seconds: float, evaluate: Callable[[], Metrics] | None) -> None:
        """Save one set of masks and measure the model under it. seconds: what selecting the masks took."""
        pattern, self.evaluate = self.options["pattern"], evaluate
        label = str(pattern) if isinstance(pattern, NM) else percent(sparsity)
        path = self.path(f"{self.stem}_{label.replace(':', 'of')}_seed{self.options['seed']}_pruning_masks.safetensors")
        masks.provenance["config"] = dataclasses.asdict(self.config) | {name: self.options[name] for name in RECORDED}
        self.preset = {"preset": masks.provenance["preset"]} if "preset" in masks.provenance else {}
        check_finite(masks)
        if self.fabric.world_size > 1:
            reduce = partial(summed, self.fabric)
            check_same("masks", masks.digest(), reduce, self.fabric.world_size, self.view.device)
        if self.writes:
            masks.save(path)
        self.written.append(path)
        if self.options["save_allocation"]:
            self._save_allocation(masks, self.options["save_allocation"], label)
        if masks.weights:
            self._save_weights(masks, path.with_name(path.name.replace("_pruning_masks", "_weights")))
        if masks.errors:
            self.errors[label] = {name: values.tolist() for name, values in masks.errors.items()}
        report = masks.report(self.view)
        self.warnings += [f"{label}: {line}" for line in report.warnings]
        self.pictures.add(label, masks, report, path)
        metrics: Metrics = {}
        if evaluate or self.options["save_model"]:
            with masks.applied(self.view):
                metrics = evaluate() if evaluate else {}
                if self.options["save_model"]:
                    name = path.name.replace("_pruning_masks.safetensors", "_model")
                    self._save_model(path.with_name(name), label, masks, metrics)
        groups = {name: 100 * count.sparsity for name, count in report.groups.items()}
        self.rows.append(self._row(label, groups, 100 * report.overall.sparsity, metrics, seconds=f"{seconds:.1f}"))
        self.times.append(
            {
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                **{name: self.options[name] for name in ("model", "pruner")},
                "sparsity": label,
                "seed": self.options["seed"],
                "calibration_seconds": f"{self.calibration_seconds:.2f}",
                "selection_seconds": f"{seconds:.2f}",
                "pruned": masks.total - masks.kept,
                "prunable": masks.total,
            }
        )
        if self.recovery:
            self._recover(label, masks, path, evaluate)

    def _recover(self, label: str, masks: Masks, path: Path, evaluate: Callable[[], Metrics] | None) -> None:
        """Recover one set of masks, whose file is `path`: save what was trained, and measure it."""
        beside = partial(str.replace, path.name, "_pruning_masks.safetensors")
        with self.recovery.recovered(masks, path.with_name(beside("_recovery"))) as found:
            tensors = {canonical(key): tensor for key, tensor in self.view.model.state_dict().items()}
            file = path.with_name(beside("_recovered.safetensors"))
            own = {key: (tuple(tensors[key].shape), tensors[key].dtype) for key in found.trained}
            self._save_tensors(own, ((key, tensors[key]) for key in own), file)
            metrics = evaluate() if evaluate else {}
            if self.options["save_model"]:
                self._save_model(path.with_name(beside("_recovered_model")), f"{label}{RECOVERED}", masks, metrics)
        row = self.rows[-1] | {"sparsity": f"{label}{RECOVERED}", "seconds": f"{found.seconds:.1f}"}
        self.rows.append(row | {name: metrics[key] for name, key in self.columns.items() if key in metrics})
        loss = f"held-out loss {found.before:.4g} -> {found.after:.4g}, after step {found.step}"
        self.facts[f"{label}{RECOVERED}"] = f"{loss}; all that was trained: {file.name}"

    def _save_allocation(self, masks: Masks, path: Path, label: str) -> None:
        """Write what the masks take from each layer, as --allocation reads it."""
        if self.writes:
            save_allocation(path, to_rules(self.view, masks), f"{self.stem} at {label}")
        self.written.append(path)

    def _save_weights(self, masks: Masks, path: Path) -> None:
        """The updated weights and biases alone, under every name that they have in the model, in the dtypes of its
        source.
        """
        keys = [(key, name) for name in masks.weights for key in masks.aliases.get(name, (name,))]
        own = {key: (shape_in(masks.weights, n), self.view.weights[n].parameter.dtype) for key, n in keys}
        own |= {key: (tuple(bias.shape), bias.dtype) for key, bias in masks.biases.items()}
        # One after the other: they may lie in files, and need not fit into memory together.
        self._save_tensors(own, chain(((key, masks.weights[name]) for key, name in keys), masks.biases.items()), path)

    def _save_tensors(
        self, own: Mapping[str, tuple[tuple[int, ...], torch.dtype]], named: Iterable[tuple[str, Tensor]], path: Path
    ) -> None:
        """Write tensors in the dtypes of the model's source. own: name -> shape and dtype, in the order of `named`."""
        shapes = {key: shape for key, (shape, _) in own.items()}
        if self.writes:
            dtypes = {key: self.view.halves.get(key, dtype) for key, (_, dtype) in own.items()}
            stream_tensors(path, shapes, named, dtypes)
        self.written.append(path)

    def _save_model(self, path: Path, label: str, masks: Masks, metrics: Metrics) -> None:
        """The model as it is, as its own library loads it, and on the hub where that is asked for."""
        if not self.writes:
            return
        written = save_model(self.view.model, path, self.view.halves)
        self.written.append(written)
        facts = {"pruner": self.options["pruner"], "sparsity": label, "seed": self.options["seed"]}
        text = card(self.options["model"], masks, self.view, metrics, facts)
        if written.is_dir():
            write_atomic(written / CARD, text.encode())
        if self.options["push_to_hub"]:
            repository = f"{self.options['push_to_hub']}-{self.options['pruner']}-{label.replace(':', 'of')}"
            self.uploaded.append(upload(written, repository, text))

    def save_scores(self, scores: Iterable[tuple[str, Tensor]]) -> None:
        """The pruner's scores, (out, in) for each weight, streamed layer by layer."""
        path = self.path(f"{self.stem}_seed{self.options['seed']}_scores.safetensors")
        if self.writes:
            stream_tensors(path, {name: tuple(weight.shape) for name, weight in self.view.weights.items()}, scores)
        self.written.append(path)

    def finish(self) -> str:
        """Write configuration, run times, plot and report; returns the summary for the reader of the terminal."""
        facts = {
            **self.preset,
            "weights": self.config.weights,
            "prunable weights": f"{self.view.numel:,} in {len(self.view.weights)} layers",
            "seed": self.options["seed"],
            "calibration": f"{self.calibration_seconds:.1f} s, once for all sparsities",
        }
        facts |= {"calibration data": self.read} if self.read else {}
        if self.recovery:
            facts |= {"recovery": self.recovery.told, **self.facts}
        if self.writes:
            self._write(facts)
            if self.recovery:
                self.recovery.forget()
        lines = ["", markdown_table(self.rows), "", *(f"warning: {line}" for line in self.warnings)]
        told = ("calibration", *(("recovery", *self.facts) if self.recovery else ()))
        lines += [*(f"{name}: {facts[name]}" for name in told), "results:"]
        lines += [f"  {path}" for path in (*self.written, self.path("report.md"), *self.uploaded)]
        return "\n".join(lines)

    def _row(
        self, label: str, groups: Mapping[str, float], total: float, metrics: Metrics, seconds: str
    ) -> dict[str, Any]:
        row = {"sparsity": label, **{f"{name} %": f"{value:.2f}" for name, value in (groups | {"all": total}).items()}}
        return row | {name: metrics[key] for name, key in self.columns.items() if key in metrics} | {"seconds": seconds}

    def _write(self, facts: Mapping[str, Any]) -> None:
        save_arguments(self.options, self.config, self.folder)
        if recipe := self.options.get("recipe"):
            recipe.save(self.folder)
        append_csv(self.path("runtimes.csv"), self.times)
        groups = {weight.name: weight.group for weight in self.view.weights.values()}
        title = f"{self.options['model']} pruned with {self.options['pruner']}"
        layers = [
            {"layer": n, "group": g, "weights": self.view.weights[n].numel}
            | {f"{label} %": f"{sparsities[n]:.2f}" for label, sparsities in self.pictures.layers.items()}
            for n, g in groups.items()
        ]
        parts = {"rows": self.rows, "warnings": self.warnings, "pictures": self.pictures.draw(title), "layers": layers}
        parts["errors"] = error_rows(self.errors)
        write_report(self.path("report.md"), title=title, facts=facts, **parts)
        write_facts(self.folder, title, facts, self.rows, [*self.columns], self.evaluate)


def check_finite(masks: Masks) -> None:
    """UserError, naming the first, where weights or biases that a method has updated are NaN or infinite."""
    updated = chain(masks.weights.items(), masks.biases.items())
    bad = [name for name, tensor in updated if not bool(tensor.isfinite().all())]
    if bad:
        told = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        raise UserError(f"NaN or infinite after the update: {told}; nothing of it is saved: try --precision 32-true")


def save_arguments(options: Mapping[str, Any], config: Any, folder: Path) -> None:
    """Write the command line and the configuration, a dataclass, to `config.yaml` of a folder."""
    arguments = {name: plain(value) for name, value in options.items() if name != "plan"}
    save_config({"arguments": arguments, "config": dataclasses.asdict(config)}, folder / "config.yaml")


def plain(value: Any) -> Any:
    """An argument of the command line as YAML writes it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)
