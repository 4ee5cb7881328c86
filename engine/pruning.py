"""The course of a pruning run around its pruner: calibration pass, evaluation of masks, files and tables of results."""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from datasets.bundled import BundledRetrieval, load_glyphs
from datasets.calibration import Calibration
from datasets.retrieval import RetrievalEvalDataset, recall
from datasets.sources import PruneConfig
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform
from engine.config import save_config
from engine.report import append_csv, markdown_table, plot_sparsity, write_report
from engine.retrieval import batches_of, retrieval_scores
from engine.tensors import stream_tensors
from sparsity.masks import Masks
from sparsity.view import PrunableView

Metrics = Mapping[str, float]


def calibrate(
    pruner: Any, view: PrunableView, config: PruneConfig, sizes: Any, encode: TextEncoder, fabric: Any, args: Namespace
) -> dict[str, Tensor]:
    """The pruner's statistic over the calibration data, summed over ranks; no data is built for a pruner without one."""
    if pruner.statistic is None:
        return {}
    data = Calibration(
        config,
        encode,
        image_size=sizes.vision.image_size,
        patch_size=sizes.vision.patch_size,
        num_batches=args.num_batches,
        seed=args.seed,
        skipped_path=args.output_dir / pruner.name / "skipped.txt",
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )
    batches = (fabric.to_device(batch) for batch in data)

    def progress(batches: Iterable) -> Iterable:
        return tqdm(batches, total=len(data), desc="calibration", unit="batch", disable=not fabric.is_global_zero)

    def total(tensor: Tensor) -> Tensor:
        return fabric.all_reduce(tensor, reduce_op="sum")

    with fabric.autocast():
        return pruner.measure(view, batches, progress=progress, reduce=total if fabric.world_size > 1 else None)


def zero_shot(model: nn.Module, config: PruneConfig, sizes: Any, encode: TextEncoder, device: Any) -> Callable[[], Metrics]:
    """A function that measures zero-shot retrieval of `model` as it is when called: recalls in per cent."""
    evaluation, side = config.evaluation, sizes.vision.image_size
    if evaluation.files:
        items = RetrievalEvalDataset(evaluation.files.annotations, evaluation.files.images, EvalTransform(side))
        captions, txt2img, img2txt = items.texts, items.txt2img, items.img2txt
    else:
        items = BundledRetrieval(load_glyphs(), "scenes", evaluation.bundled_scenes, side=side)
        captions = [items.scene(i).caption for i in range(len(items))]
        txt2img, img2txt = list(range(len(items))), [[i] for i in range(len(items))]
    texts = encode.plain(captions)

    def measure() -> Metrics:
        images = tqdm(batches_of(items), desc="evaluation", unit="batch", total=-(-len(items) // 128), leave=False)
        scores = retrieval_scores(model, images, texts, k_test=evaluation.k_test, device=device)
        return recall(*scores, txt2img, img2txt)

    return measure


def timed(masks: Iterable[tuple[Any, Masks]]) -> Iterator[tuple[Any, Masks, float]]:
    """(sparsity, masks, seconds that it took to choose them)."""
    begin = time.perf_counter()
    for sparsity, chosen in masks:
        yield sparsity, chosen, time.perf_counter() - begin
        begin = time.perf_counter()


class Results:
    """Collects the masks of a run, writes each as soon as it is there, and the report when all are."""

    def __init__(self, args: Namespace, view: PrunableView, config: PruneConfig, folder: Path):
        self.args, self.view, self.config, self.folder = args, view, config, folder
        self.stem = f"{args.model}_{args.pruner}"
        self.calibration_seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.layers: dict[str, dict[str, float]] = {}
        self.warnings: list[str] = []
        self.written: list[Path] = []

    def path(self, name: str) -> Path:
        return self.folder / name

    def dense(self, metrics: Metrics) -> None:
        """The first row: the model before pruning."""
        self.rows.append(self._row("dense", dict.fromkeys(self.view.groups, 0.0), 0.0, metrics, seconds="-"))

    def add(self, sparsity: Any, masks: Masks, seconds: float, evaluate: Callable[[], Metrics] | None) -> None:
        """Save one set of masks and measure the model under it. seconds: what selecting the masks took."""
        label = str(self.args.pattern) if self.args.pattern else f"{float(100 * sparsity):g}"
        path = self.path(f"{self.stem}_{label.replace(':', 'of')}_seed{self.args.seed}_pruning_masks.safetensors")
        masks.save(path)
        self.written.append(path)
        report = masks.report(self.view)
        self.warnings += [f"{label}: {line}" for line in report.warnings]
        self.layers[label] = {name: 100 * count.sparsity for name, count in report.layers.items()}
        metrics = {}
        if evaluate:
            with masks.applied(self.view):
                metrics = evaluate()
        groups = {name: 100 * count.sparsity for name, count in report.groups.items()}
        row = self._row(label, groups, 100 * report.overall.sparsity, metrics, seconds=f"{seconds:.1f}")
        self.rows.append(row)
        self.times.append(
            {
                "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                "model": self.args.model,
                "pruner": self.args.pruner,
                "sparsity": label,
                "seed": self.args.seed,
                "calibration_seconds": f"{self.calibration_seconds:.2f}",
                "selection_seconds": f"{seconds:.2f}",
                "pruned": masks.total - masks.kept,
                "prunable": masks.total,
            }
        )

    def _row(self, label: str, groups: Mapping[str, float], total: float, metrics: Metrics, seconds: str) -> dict[str, Any]:
        row = {"sparsity": label, **{f"{name} %": f"{value:.2f}" for name, value in groups.items()}, "all %": f"{total:.2f}"}
        for way, prefix in (("i2t", "txt"), ("t2i", "img")):
            row |= {f"{way} R@{k}": metrics[f"{prefix}_r{k}"] for k in (1, 5, 10) if f"{prefix}_r{k}" in metrics}
        return row | {"seconds": seconds}

    def save_scores(self, scores: Iterable[tuple[str, Tensor]]) -> None:
        """The pruner's scores, (out, in) for each weight, streamed layer by layer."""
        path = self.path(f"{self.stem}_seed{self.args.seed}_scores.safetensors")
        stream_tensors(path, {name: tuple(weight.shape) for name, weight in self.view.weights.items()}, scores)
        self.written.append(path)

    def finish(self) -> str:
        """Write configuration, run times, plot and report; returns the summary for the reader of the terminal."""
        arguments = {name: _plain(value) for name, value in vars(self.args).items()}
        save_config({"arguments": arguments, "config": dataclasses.asdict(self.config)}, self.path("config.yaml"))
        append_csv(self.path("runtimes.csv"), self.times)
        groups = {weight.name: weight.group for weight in self.view.weights.values()}
        plot = self.path("sparsity.png")
        title = f"{self.args.model} pruned with {self.args.pruner}"
        plot_sparsity(plot, self.layers, groups, title)
        layers = [
            {"layer": n, "group": g, "weights": self.view.weights[n].numel}
            | {f"{label} %": f"{sparsities[n]:.2f}" for label, sparsities in self.layers.items()}
            for n, g in groups.items()
        ]
        facts = {
            "weights": self.config.weights,
            "prunable weights": f"{self.view.numel:,} in {len(self.view.weights)} layers",
            "seed": self.args.seed,
            "calibration": f"{self.calibration_seconds:.1f} s, once for all sparsities",
        }
        write_report(
            self.path("report.md"),
            title=title,
            facts=facts,
            rows=self.rows,
            warnings=self.warnings,
            plot=plot.name,
            layers=layers,
        )
        lines = ["", markdown_table(self.rows), "", *(f"warning: {line}" for line in self.warnings)]
        lines += [f"calibration: {facts['calibration']}", "results:"]
        lines += [f"  {path}" for path in (*self.written, self.path("report.md"))]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """An argument as YAML writes it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)
