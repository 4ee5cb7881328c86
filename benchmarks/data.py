"""Images per second of the data loaders, from a folder and from WebDataset shards, by number of workers, against
Pillow's JPEG decoding and resizing alone in one process. The images (480 x 360, like photographs to the decoder) are
made for it. Transforms: "plain" resizes, "crop" also crops and mirrors, "train" adds RandAugment.

    python -m benchmarks.data                                # 300 images, five minutes on two cores
    python -m benchmarks.data --images 64 --passes 1 --repeats 1 --workers 1

Each measurement follows one of the floor, and the ratio is that of the two; medians of the repeats. Where workers have
to share their cores, with each other or with anything else, only the ratio by processor time says what they cost.
"""

import argparse
import io
import json
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import draw_scene
from datasets.collate import collate
from datasets.images import load_image
from datasets.loaders import loader
from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.shards import ShardDataset, shard_loader
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform, RandAugment, TrainTransform, resize
from models.parts.tokenizer import WordPiece

SIZE = (480, 360)
SHARD = 50  # samples in a shard
TRANSFORMS: dict[str, Callable[[int], Any]] = {
    "plain": EvalTransform,
    "crop": lambda side: TrainTransform(side, augment=RandAugment(num_ops=0)),
    "train": TrainTransform,
}


def make_jpegs(number: int) -> list[tuple[bytes, str]]:
    """Encoded images with captions: bundled scenes, enlarged, with the noise of a sensor."""
    glyphs, made = load_glyphs(), []
    for i in range(number):
        rng = np.random.default_rng((0, i))
        scene = draw_scene(glyphs, rng, glyphs.train_vendors, 120, int(rng.integers(1, 5)))
        enlarged = np.asarray(Image.fromarray(scene.image).resize(SIZE, Image.Resampling.BICUBIC), np.float32)
        noisy = (enlarged + rng.normal(0, 8, enlarged.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        made.append((buffer.getvalue(), scene.caption))
    return made


def write_folder(root: Path, images: list[tuple[bytes, str]]) -> None:
    """`images/*.jpg` and `annotations.json`, in CC3M's layout."""
    (root / "images").mkdir()
    records = []
    for i, (content, caption) in enumerate(images):
        (root / "images" / f"{i:09d}.jpg").write_bytes(content)
        records.append({"image": f"{i:09d}.jpg", "caption": caption, "dataset": "bundled"})
    (root / "annotations.json").write_text(json.dumps(records))


def write_shards(root: Path, images: list[tuple[bytes, str]]) -> None:
    """Shards in img2dataset's layout."""
    (root / "shards").mkdir()
    for shard, first in enumerate(range(0, len(images), SHARD)):
        part = images[first : first + SHARD]
        with tarfile.open(root / "shards" / f"{shard:05d}.tar", "w") as tar:
            for i, (content, caption) in enumerate(part, first):
                for extension, data in (("jpg", content), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (root / "shards" / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": len(part)}))


def with_pillow(path: Path, side: int) -> None:
    with Image.open(path, formats=("JPEG",)) as image:
        image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def with_ours(path: Path, side: int) -> None:
    resize(load_image(path), side)


def augmenting(paths: Sequence[Path], side: int) -> float:
    """Milliseconds of RandAugment alone, for an image."""
    small = [load_image(path).resize((side, side)) for path in paths]
    augment, begin = RandAugment(), time.process_time()
    for i, image in enumerate(small):
        augment(image, np.random.default_rng(i))
    return 1000 * (time.process_time() - begin) / len(paths)


class Rate(NamedTuple):
    """Images per second of the clock, and per second that processors were busy with them."""

    clock: float
    busy: float


def alone(read: Callable[[Path, int], None], paths: Sequence[Path], side: int) -> Rate:
    """Decoding and resizing, with nothing around it."""
    begin, busy = time.perf_counter(), time.process_time()
    for path in paths:
        read(path, side)
    return Rate(len(paths) / (time.perf_counter() - begin), len(paths) / (time.process_time() - busy))


def rate(batches: DataLoader) -> Rate:
    """From the first batch on by the clock: the start of workers is left out. Their processor time counts whole."""
    busy = _busy()
    iterator = iter(batches)
    first = len(next(iterator)["image"])
    begin = time.perf_counter()
    images = sum(len(batch["image"]) for batch in iterator)
    clock = time.perf_counter() - begin
    del iterator  # ends the workers, whose time is known then
    own = batches.num_workers == 0
    return Rate(images / clock, (first + images) / (_busy()[own] - busy[own]))


def _busy() -> tuple[float, float]:
    """Processor seconds of the processes that have ended, and of this one."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime, time.process_time()


class Measured:
    """Rates of what is measured, and of the floor measured just before."""

    def __init__(self, floor: Callable[[], Rate]):
        self.floor, self.pairs = floor, []

    def add(self, measure: Callable[[], Rate]) -> None:
        floor = self.floor()
        self.pairs.append((measure(), floor))

    def line(self, label: str, processes: int = 1) -> str:
        ours, floor = (statistics.median(rate.clock for rate in side) for side in zip(*self.pairs, strict=True))
        clock = statistics.median(mine.clock / processes / floor.clock for mine, floor in self.pairs)
        busy = statistics.median(mine.busy / floor.busy for mine, floor in self.pairs)
        return (
            f"{label}: {ours:.0f} images/s, decode + resize alone {floor:.0f}: "
            f"{clock:.2f} x for each process, {busy:.2f} x by processor time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=2, help="over the images in each measurement: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, interleaved; medians: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--side", type=int, default=224, help="of the images that come out (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--transforms", choices=TRANSFORMS, nargs="+", default=list(TRANSFORMS), help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, images = Path(folder), make_jpegs(args.images)
        write_folder(root, images)
        write_shards(root, images)
        paths = sorted((root / "images").glob("*.jpg"))
        size = sum(len(content) for content, _ in images) / len(images) / 1024
        print(f"{args.images} JPEGs of {SIZE[0]} x {SIZE[1]}, {size:.0f} KB each, to {args.side} x {args.side}")
        floor = partial(alone, with_pillow, paths, args.side)
        own = Measured(floor)
        measured = {label: Measured(floor) for label in loaders(args, root)}
        augment = []
        for _ in range(args.repeats):
            augment.append(augmenting(paths, args.side))
            own.add(partial(alone, with_ours, paths, args.side))
            for label, batches in loaders(args, root).items():
                measured[label].add(partial(rate, batches))
    print(own.line("decode + resize of this project, alone"))
    floor_time = 1000 / statistics.median(floor.busy for _, floor in own.pairs)
    print(
        f"RandAugment alone: {statistics.median(augment):.2f} ms, decode + resize {floor_time:.2f} ms of processor time"
    )
    for (source, name, workers), both in measured.items():
        print(both.line(f"{source}, {name} transform, {workers} workers", max(1, workers)))


def loaders(args: argparse.Namespace, root: Path) -> dict[tuple[str, str, int], DataLoader]:
    """(source, transform, workers) -> its batches."""
    encode = TextEncoder(WordPiece("data/vocab/mini_vocab.txt"), 40)
    result = {}
    for name in args.transforms:
        transform = TRANSFORMS[name](args.side)
        files = ImageTextDataset([(root / "annotations.json", root / "images")], transform, encode, seed=0)
        streams = -(-args.images // SHARD)  # more would pass over the same bytes, which long shards are spared
        shards = ShardDataset([str(root / "shards")], transform, encode, seed=0, streams=streams)
        for workers in args.workers:
            options = {"stop": args.passes * args.images // args.batch_size, "workers": workers}
            result["folder", name, workers] = loader(files, args.batch_size, collate, seed=0, **options)
            result["shards", name, workers] = shard_loader(shards, args.batch_size, collate, **options)
    return result


if __name__ == "__main__":
    main()
