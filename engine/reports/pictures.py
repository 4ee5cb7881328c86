"""The pictures in the report of a pruning run: gathered while the masks are there, drawn at its end."""

import glob
from pathlib import Path

from torch import Tensor

from engine.reports.mask_overlap import description, overlap
from engine.reports.plots import plot_heat, plot_magnitudes, plot_overlap, plot_sparsity
from engine.reports.report import Picture
from engine.reports.sensitivity import report_sensitivity
from engine.reports.weight_places import magnitudes
from sparsity.masks import Masks, Report
from sparsity.sensitivity.measured import Sensitivity
from sparsity.view import PrunableView

# How each picture is read.
_SPARSITY = (
    "Left: the share of each layer's weights that are zero, in the model's order, a line for each sparsity that was"
    " asked for. Right: the same share for all weights of a modality. A layer at 100 % passes nothing on."
)
_HEAT = (
    "A cell is a weight matrix: its block is the row, its place in the block the column, and the number its sparsity in"
    " per cent. Grey: the block has no such matrix. Even colours: all layers lose the same; dark cells are spared."
)
_MAGNITUDES = (
    "Histograms of the weights by their magnitude, both axes logarithmic: grey, all weights of the dense model; lines,"
    " those that each mask keeps, at their dense values. A line that follows the grey area on the right and falls on"
    " the left: small weights are pruned."
)
_OVERLAP = (
    "How far two masks agree: of the weights that either keeps (left) or prunes (right), the share that both do; 1: the"
    " same mask. By chance: what random masks of this sparsity would have."
)


class Pictures:
    """Sparsity of layers, groups and matrices, magnitudes of weights, and overlap with the masks of other pruners.

    folder: of the results; those of other pruners lie beside it. model, stem: the names of its mask files begin so,
    without and with the pruner.
    """

    def __init__(self, folder: Path, view: PrunableView, model: str, stem: str):
        self.folder, self.view, self.model, self.stem = folder, view, model, stem
        self.layers: dict[str, dict[str, float]] = {}
        self.groups: dict[str, dict[str, float]] = {}
        self.magnitudes: dict[str, dict[str, Tensor]] = {"dense": magnitudes(view)}
        self.masks: dict[str, tuple[Path, float]] = {}  # file and share of weights kept
        self.sensitivity = Sensitivity()  # of each layer, where the allocation has measured it

    def add(self, label: str, masks: Masks, report: Report, path: Path) -> None:
        """Masks under their label ("63", "2:4"), what they leave, and the file in which they are."""
        self.layers[label] = {name: 100 * count.sparsity for name, count in report.layers.items()}
        self.groups[label] = {name: 100 * count.sparsity for name, count in report.groups.items()}
        self.magnitudes[label] = magnitudes(self.view, masks)
        self.masks[label] = path, 1 - report.overall.sparsity

    def draw(self, title: str) -> list[Picture]:
        """Write the files; returns the sections of the report."""
        group_of = {weight.name: weight.group for weight in self.view.weights.values()}
        pictures = [
            Picture("Sparsity of layers and modalities", "sparsity.png", [_SPARSITY]),
            Picture("Heat map of the sparsity of each weight matrix", "heatmap.png", [_HEAT]),
            Picture("Magnitudes before and after pruning", "magnitudes.png", [_MAGNITUDES]),
        ]
        files = [self.folder / picture.file for picture in pictures]
        plot_sparsity(files[0], self.layers, self.groups, group_of, title)
        plot_heat(files[1], self.layers, group_of, title)
        plot_magnitudes(files[2], self.magnitudes, title)
        measured = report_sensitivity(self.folder, self.view, self.sensitivity, title)
        return pictures + measured + self._draw_overlap(title)

    def _draw_overlap(self, title: str) -> list[Picture]:
        """Nothing where there are no masks to compare with."""
        overlaps, left_out = {}, []
        for label, (path, share) in self.masks.items():
            others, reasons = self._others(path)
            left_out += reasons
            if others:
                paths = [path, *others]
                overlaps[label] = ([self._name(p, path) for p in paths], *overlap(paths), share)
        notes = ["Left out: " + "; ".join(left_out) + "."] if left_out else []
        file = self.folder / "overlap.png"
        if overlaps:
            plot_overlap(file, overlaps, title)
            return [Picture("Overlap with other pruners", file.name, [_OVERLAP, *notes])]
        file.unlink(missing_ok=True)  # of an earlier run
        return [Picture("Overlap with other pruners", "", notes)] if notes else []

    def _others(self, path: Path) -> tuple[list[Path], list[str]]:
        """Mask files of other pruners for the same model, sparsity and seed, and why some of them do not count."""
        suffix, own = path.name.removeprefix(self.stem), description(path)
        pattern = f"*/{glob.escape(self.model)}_*{glob.escape(suffix)}"
        found, left_out = [], []
        for other in sorted(self.folder.parent.glob(pattern)):
            name = other.relative_to(self.folder.parent).as_posix()
            try:
                known = description(other)
            except ValueError:
                left_out.append(f"{name} (not a usable mask file)")
                continue
            if (known["provenance"].get("model"), known["shapes"]) != (own["provenance"].get("model"), own["shapes"]):
                left_out.append(f"{name} (masks of another model)")
            elif other.resolve() != path.resolve():
                found.append(other)
        return found, left_out

    def _name(self, path: Path, own: Path) -> str:
        """The pruner, as it stands in the file's name."""
        return path.name.removeprefix(f"{self.model}_").removesuffix(own.name.removeprefix(self.stem))
