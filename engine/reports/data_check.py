"""Check of the data that a run would read: what is there, what is missing, and how to get it."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.pruning import ExternalPruneConfig, LabelsPruneConfig, NoisePruneConfig, PruneConfig, PrunedModel
from configs.shard_names import HOW_TO_GET as SHARDS
from configs.shard_names import is_pattern, shard_names
from configs.sources import Files, LabelledImages
from datasets.annotations import HOW_TO_GET, ImageRoot, read_by_folder
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.texts import read_texts
from datasets.collate import Skipped
from datasets.labelled.class_folders import images_below
from datasets.labelled.image_folder import ImageFolder
from datasets.labelled.public import labelled
from datasets.labelled.sound_folder import SOUNDS
from datasets.own.check import check_own
from datasets.pairs.pretraining import EXPECTED as PAIRS
from datasets.pairs.pretraining import parse_pair
from datasets.pairs.regions import EXPECTED as REGIONS
from datasets.pairs.regions import parse_regions
from datasets.pairs.tars import open_shard
from datasets.tasks.retrieval import EXPECTED as RETRIEVAL
from datasets.tasks.retrieval import parse_captioned
from datasets.transforms import EvalTransform
from sparsity.errors import UserError

log = logging.getLogger(__name__)

LOOKED_UP = 64  # images of each source that are opened
SHOWN = 100  # faults of each file of the user's; the others are counted
BUNDLED = "data/bundled"
WAYS = {  # to get what is missing, by the beginning of its path
    "data/pretrain": "./download_annots.sh",
    "data/finetune": "./download_annots.sh",
    "data/imagenet/annots": "./download_annots.sh",
    "data/imagenet": "the ImageNet object localisation challenge on Kaggle, see docs/datasets.md",
    "images/coco": "scripts/download_images.sh coco",
    "images/vg": "scripts/download_images.sh vg",
    "images/cc3m": "img2dataset, see docs/datasets.md; as a folder of images or as WebDataset shards",
    "images/sbu": "img2dataset, see docs/datasets.md; as a folder of images or as WebDataset shards",
    BUNDLED: "it comes with the repository: git checkout data/bundled, or scripts/rebuild_bundled.sh",
}


@dataclass(frozen=True)
class Finding:
    """source: what it is for ("weights", "general", ...). path: file, folder or shards. detail: what was found."""

    source: str
    path: str
    ok: bool
    detail: str

    @property
    def way(self) -> str:
        """How to get it."""
        if self.source == "weights":
            return "give --weights PATH, or --weights random"
        if is_pattern(self.path):
            return SHARDS
        return next((way for start, way in WAYS.items() if Path(self.path).is_relative_to(start)), HOW_TO_GET)


def check_data(config: PrunedModel, regions: bool = True) -> list[Finding]:
    """Look at everything that a configuration names: weights, calibration data and evaluation data.

    regions: the second source of image-text models has regions of images; else it has image-text pairs, too.
    Annotation files are read whole, some images of each source are opened, and of each shard the beginning and the end.
    """
    if isinstance(config, ExternalPruneConfig):
        return _external(config)
    findings = [_weights(config)] if config.checkpoint else []
    if isinstance(config, NoisePruneConfig):
        return findings + _noise(config)
    if config.general_loader:
        detail = f"says what is read, {config.batch_size} in a batch"
        findings.append(Finding("loader", config.general_loader, True, detail))
    if isinstance(config, LabelsPruneConfig):
        return findings + _labels(config)
    return findings + _pairs(config, regions)


def _external(config: ExternalPruneConfig) -> list[Finding]:
    weights = [_weights(config)] if config.file else []
    try:
        config.check_calibration("")
        if Path(config.calibration).is_file():
            told = f"{len(read_texts(config.calibration)):,} texts"
            return [*weights, Finding("calibration", config.calibration, True, told)]
        if not Path(config.calibration).is_dir():
            return [*weights, Finding("calibration", config.calibration, True, "a function, which was not called")]
        if not images_below(Path(config.calibration)) and (sounds := images_below(Path(config.calibration), SOUNDS)):
            return [*weights, Finding("calibration", config.calibration, True, f"{len(sounds):,} sounds")]
        data = ImageFolder(config.calibration, seed=0, decoding=config.decoding)
    except (OSError, ValueError) as error:
        return [*weights, Finding("calibration", config.calibration or "none", False, str(error))]
    found = _images("calibration", config.calibration, data.root, data.paths, config.max_skipped)
    what = f"{len(data):,} images" + " with captions" * data.captioned
    what += f" of {len(data.classes)} classes" if data.classes else ""
    return [*weights, replace(found, detail=f"{what}; {found.detail}")]


def _noise(config: NoisePruneConfig) -> list[Finding]:
    bundled = {"calibration": config.bundled, "evaluation": config.bundled and config.evaluation.samples}
    findings = [_bundled(source, "images") for source, used in bundled.items() if used]
    if config.bundled:
        return findings
    if not config.latents:
        return [*findings, Finding("calibration", "none", True, "what the dense model draws")]
    there = Path(config.latents).is_file()
    return [*findings, Finding("calibration", config.latents, there, "latents" if there else "file not found")]


def _labels(config: LabelsPruneConfig) -> list[Finding]:
    bundled = {"calibration": config.bundled, "evaluation": config.evaluation.bundled_images}
    findings = [_bundled(source, "images") for source, used in bundled.items() if used]
    sources = {"calibration": config.images, "evaluation": config.evaluation.images}
    return findings + [_labelled(source, images, config) for source, images in sources.items() if images]


def _pairs(config: PruneConfig, regions: bool) -> list[Finding]:
    bundled = {"calibration": config.bundled, "evaluation": config.evaluation.bundled_scenes}
    findings = [_bundled(source, "scenes") for source, used in bundled.items() if used]
    for source, files, parse, expected in (
        ("general", config.general, parse_pair, PAIRS),
        ("region", config.region, *((parse_regions, REGIONS) if regions else (parse_pair, PAIRS))),
        ("evaluation", [config.evaluation.files] if config.evaluation.files else [], parse_captioned, RETRIEVAL),
    ):
        for each in files:
            if each.annotations:
                findings += _annotated(source, each, parse, expected, config)
            else:
                findings.append(_shards(source, each.images))
    return findings


def table(findings: Sequence[Finding]) -> str:
    """The findings as lines for the terminal, with a way to get what is missing."""
    lines = []
    for finding in findings:
        state = "ok" if finding.ok else "missing"
        lines.append(f"{state:8} {finding.source:12} {finding.path}: {finding.detail}")
        lines += [] if finding.ok else [f"{'':21} to get it: {finding.way}"]
    missing = sum(not finding.ok for finding in findings)
    lines.append(f"{missing} of {len(findings)} missing or not whole" if missing else f"all {len(findings)} there")
    return "\n".join(lines)


def _weights(config: PrunedModel) -> Finding:
    path = Path(config.checkpoint)
    if path.is_file():
        return Finding("weights", str(path), True, f"{path.stat().st_size / 1e6:.1f} MB")
    try:
        config.check_weights()
    except FileNotFoundError:
        return Finding("weights", str(path), False, "file not found")
    detail = "a folder" if path.is_dir() else "a repository on the hub, downloaded when it is needed"
    return Finding("weights", str(path), True, detail)


def _labelled(source: str, images: LabelledImages, config: PrunedModel) -> Finding:
    try:
        data = labelled(images, EvalTransform(1), seed=0, decoding=config.decoding)
    except (OSError, ValueError) as error:
        return Finding(source, str(images.images), False, _without(str(images.images), error))
    found = _images(source, str(images.images), data.root, [path for path, _ in data.records], config.max_skipped)
    return replace(found, detail=f"{len(data):,} images of {len(data.class_names):,} classes; {found.detail}")


def _bundled(source: str, what: str) -> Finding:
    try:
        return Finding(source, BUNDLED, True, f"bundled {what}, drawn from {len(load_glyphs(BUNDLED))} glyphs")
    except (OSError, ValueError) as error:
        return Finding(source, BUNDLED, False, str(error))


def _annotated(
    source: str, files: Files, parse: Callable[[dict], Any], expected: str, config: PrunedModel
) -> list[Finding]:
    paths: dict[str, list[str]] = {files.images: []}
    try:
        found = read_by_folder(files.annotations, files.folders, parse, expected)
        paths = {str(folder): [record[0] for record in records] for folder, records in found}
        annotations = Finding(source, files.annotations, True, f"{sum(map(len, paths.values())):,} records")
    except (OSError, ValueError) as error:
        annotations = Finding(source, files.annotations, False, _without(files.annotations, error))
    return [annotations, *(_folder(source, folder, inside, config) for folder, inside in paths.items())]


def _folder(source: str, folder: str, paths: list[str], config: PrunedModel) -> Finding:
    try:
        root = ImageRoot(folder, config.decoding)
    except FileNotFoundError as error:
        return Finding(source, folder, False, _without(folder, error))
    if not paths:
        return Finding(source, folder, True, "a folder; its images were not looked up")
    return _images(source, folder, root, paths, config.max_skipped)


def _images(source: str, folder: str, root: ImageRoot, paths: list[str], max_missing: float) -> Finding:
    """An even sample of the images is opened."""
    probes = [paths[i * len(paths) // LOOKED_UP] for i in range(LOOKED_UP)] if len(paths) > LOOKED_UP else paths
    absent = [path for path in probes if not root.find(path).is_file()]
    damaged = [path for path in probes if path not in absent and isinstance(root.load(path), Skipped)]
    detail = f"{len(probes) - len(absent)} of {len(probes)} images looked up are there"
    detail += f", not {absent[0]}" if absent else ""
    detail += f", {len(damaged)} of them cannot be read, e.g. {damaged[0]}" if damaged else ""
    return Finding(source, folder, len(absent) + len(damaged) <= max_missing * len(probes), detail)


def _shards(source: str, images: str) -> Finding:
    """Every shard that is there is opened."""
    try:
        names = shard_names(images)
    except ValueError as error:
        return Finding(source, images, False, _without(images, error))
    absent = [name for name in names if not Path(name).is_file()]
    samples, damaged = 0, []
    for name in names:
        if name not in absent:
            try:
                samples += open_shard(Path(name))
            except (OSError, ValueError) as error:
                damaged.append(str(error))
    detail = f"{len(names) - len(absent)} of {len(names)} shards are there, with {samples:,} samples"
    detail += f"; not {absent[0]}" if absent else ""
    detail += f"; {len(damaged)} of them are damaged, e.g. {damaged[0]}" if damaged else ""
    return Finding(source, images, bool(samples) and not absent and not damaged, detail)


def _without(path: str, error: Exception) -> str:
    """The message without the path that it begins with, and without the way to get it."""
    reason = str(error).removeprefix(f"{path}: ").removesuffix(f"; {HOW_TO_GET}")
    return reason.partition(";")[0] if isinstance(error, FileNotFoundError) else reason


def report_own_data(args: Namespace, kind: str) -> None:
    """Log what `--data` and `--val_data` hold and what is wrong with them. kind: "captions" or "questions".

    Raises UserError where something is, and where there is no `--data`.
    """
    if not args.data:
        raise UserError("--check_data reads what --data names: give it")
    faults = 0
    for path in filter(None, (args.data, args.val_data)):
        checked = check_own(path, kind)
        log.info("%s", checked)
        for fault in checked.faults[:SHOWN]:
            log.info("  %s", fault)
        if len(checked.faults) > SHOWN:
            log.info("  and %s more", f"{len(checked.faults) - SHOWN:,}")
        faults += len(checked.faults)
    if faults:
        raise UserError(f"--data: {faults:,} faults, listed above; docs/data.md shows what is expected")
