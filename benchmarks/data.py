"""Images per second of the data loaders, from a folder and from WebDataset shards, by number of workers, against JPEG
decoding and resizing alone in one process. The images (480 x 360, like photographs to the decoder) are made for it.

    python -m benchmarks.data                                # 300 images, two minutes on two cores
    python -m benchmarks.data --images 64 --passes 1 --repeats 1
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.annotations import load_image
from datasets.bundled import draw_scene, load_glyphs
from datasets.collate import collate
from datasets.loaders import loader
from datasets.pretraining import ImageTextDataset
from datasets.shards import ShardDataset, shard_loader
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform, TrainTransform, resize
from models.tokenizer import WordPiece

SIZE = (480, 360)
SHARD = 50  # samples in a shard
TRANSFORMS = {"train": TrainTransform, "plain": EvalTransform}


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


def write_folder(root: Path, images: list[tuple[bytes, str]]) -> Path:
    """`images/*.jpg` and the annotation file, in CC3M's layout."""
    (root / "images").mkdir()
    records = []
    for i, (content, caption) in enumerate(images):
        (root / "images" / f"{i:09d}.jpg").write_bytes(content)
        records.append({"image": f"{i:09d}.jpg", "caption": caption, "dataset": "bundled"})
    annotations = root / "annotations.json"
    annotations.write_text(json.dumps(records))
    return annotations


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


def floor(root: Path, side: int) -> float:
    """Images per second of decoding and resizing, with nothing around it."""
    paths = sorted((root / "images").glob("*.jpg"))
    begin = time.perf_counter()
    for path in paths:
        resize(load_image(path), side)
    return len(paths) / (time.perf_counter() - begin)


def rate(batches: Iterable[dict]) -> float:
    """Images per second from the first batch on: the start of workers is left out."""
    iterator = iter(batches)
    next(iterator)
    begin, images = time.perf_counter(), 0
    for batch in iterator:
        images += len(batch["image"])
    return images / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=3, help="over the images in each measurement: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, interleaved; medians: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--side", type=int, default=224, help="of the images that come out (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--transform", choices=TRANSFORMS, default="train", help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    encode = TextEncoder(WordPiece("data/vocab/mini_vocab.txt"), 40)
    transform = TRANSFORMS[args.transform](args.side)
    steps = args.passes * args.images // args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        root, images = Path(folder), make_jpegs(args.images)
        annotations = write_folder(root, images)
        write_shards(root, images)
        files = ImageTextDataset([(annotations, root / "images")], transform, encode, seed=0)
        streams = -(-args.images // SHARD)  # more would pass over the same bytes, which long shards are spared
        shards = ShardDataset([str(root / "shards")], transform, encode, seed=0, streams=streams)
        rates: dict[tuple[str, int], list[float]] = {}
        floors = []
        for _ in range(args.repeats):
            floors.append(floor(root, args.side))
            for workers in args.workers:
                options = {"stop": steps, "workers": workers}
                read = {
                    "folder": loader(files, args.batch_size, collate, seed=0, **options),
                    "shards": shard_loader(shards, args.batch_size, collate, **options),
                }
                for source, batches in read.items():
                    rates.setdefault((source, workers), []).append(rate(batches))
    size = sum(len(content) for content, _ in images) / len(images) / 1024
    print(f"{args.images} JPEGs of {SIZE[0]} x {SIZE[1]}, {size:.0f} KB each, to {args.side} x {args.side}")
    alone = statistics.median(floors)
    print(f"decode + resize alone, one process: {alone:.0f} images/s")
    for (source, workers), measured in rates.items():
        ours, processes = statistics.median(measured), max(1, workers)
        print(
            f"{source}, {workers} workers, {args.transform} transform: {ours:.0f} images/s, "
            f"{ours / processes / alone:.2f} x decode + resize for each process that reads"
        )


if __name__ == "__main__":
    main()
