"""Bundled scenes as files in the layouts of the public sets."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datasets.bundled.glyphs import Glyphs
from datasets.bundled.scenes import MAX_OBJECTS, BundledRetrieval, Scene, _generator, draw_scene
from sparsity.errors import UserError


def export_public(
    root: str | Path,
    n_images: int,
    glyphs: Glyphs,
    *,
    side: int = 224,
    max_objects: int = MAX_OBJECTS,
    seed: int = 0,
) -> list[Path]:
    """Write scenes as image files and annotations in the public layouts, for whatever reads those.

    Each of `images/{coco,vg,cc3m,sbu}/bundled` under `root` gets `n_images` PNG files of training scenes, and coco's as
    many for validation and for test. Captions of training files say what is there and not where, since readers of these
    layouts crop and mirror images. Test is `BundledRetrieval` of the same seed and side, validation that of seed + 1.

    Returns:
        The annotation files, `data/pretrain/*.json` and `data/finetune/itr/*.json`.

    Raises:
        UserError: one of the annotation files is there already; nothing is written then.
    """
    if n_images < 1:
        raise UserError(f"n_images must be at least 1, got {n_images!r}")
    pretrain = ("cc3m_pretrain", "sbu_pretrain", "coco_karpathy_gby_image", "vg_dense_gby_image", "vg_regions")
    files = [Path(root, "data", "pretrain", f"{name}.json") for name in pretrain]
    files += [Path(root, "data", "finetune", "itr", f"coco_{split}.json") for split in ("train", "val", "test")]
    taken = [path for path in files if path.exists()]
    if taken:
        raise UserError(f"{taken[0]}: already exists and is not overwritten; choose another folder")
    drawn = {}
    for number, source in enumerate(("cc3m", "sbu", "coco", "vg")):
        generators = [_generator(seed, "export", number, i) for i in range(n_images)]
        scenes = [
            draw_scene(glyphs, rng, glyphs.train_vendors, side, int(rng.integers(1, max_objects + 1)))
            for rng in generators
        ]
        drawn[source] = _save_images(root, source, "", scenes)
    for split, offset in (("val_", 1), ("test_", 0)):
        items = BundledRetrieval(glyphs, "scenes", n_images, side=side, max_objects=max_objects, seed=seed + offset)
        drawn[split] = _save_images(root, "coco", split, [items.scene(i) for i in range(len(items))])
    records = [[_pair(path, scene, source) for path, scene in drawn[source]] for source in ("cc3m", "sbu", "coco")]
    records += [[_dense(path, scene) for path, scene in drawn["vg"]], [_regions(*pair) for pair in drawn["vg"]]]
    records += [[_fine_tuned(i, *pair) for i, pair in enumerate(drawn["coco"])]]
    records += [[_tested(*pair) for pair in drawn[split]] for split in ("val_", "test_")]
    for path, content in zip(files, records, strict=True):
        _write(path, (json.dumps(content, indent=1) + "\n").encode())
    return files


def _names(scene: Scene) -> str:
    return " and ".join(item.name for item in scene.objects)


def _pair(path: str, scene: Scene, source: str) -> dict[str, Any]:
    return {"image": path, "caption": _names(scene), "dataset": source}


def _dense(path: str, scene: Scene) -> dict[str, Any]:
    boxes = [list(item.box) for item in scene.objects]
    return {"image": path, "caption": [item.name for item in scene.objects], "bb": boxes, "dataset": "vg"}


def _regions(path: str, scene: Scene) -> dict[str, Any]:
    elems = [{"bb": list(item.box), "caption": item.name} for item in scene.objects]
    return {"image": path, "caption": _names(scene), "elems": elems}


def _fine_tuned(i: int, path: str, scene: Scene) -> dict[str, Any]:
    # Paths below images/coco: the other one of the two public kinds.
    return {"image": path.removeprefix("images/coco/"), "caption": _names(scene), "image_id": f"coco_{i}"}


def _tested(path: str, scene: Scene) -> dict[str, Any]:
    return {"image": path.removeprefix("images/coco/"), "caption": [scene.caption]}


def _save_images(root: str | Path, source: str, prefix: str, scenes: Sequence[Scene]) -> list[tuple[str, Scene]]:
    """Write scenes as PNG; returns them with their paths relative to the root."""
    saved = []
    for i, scene in enumerate(scenes):
        path, buffer = f"images/{source}/bundled/{prefix}{i + 1:012d}.png", io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "PNG")
        _write(Path(root, path), buffer.getvalue())
        saved.append((path, scene))
    return saved


def _write(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
