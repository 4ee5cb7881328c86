"""Image-text retrieval: the sets for training and evaluation, and the recalls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.decoding import Decoding
from configs.finetuning import RetrievalConfig
from configs.task import DEBUG_IMAGES
from datasets.annotations import ImageRoot, Records, get_id, get_path, get_texts, read_records
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledScenes
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.own.captions import own_captions
from datasets.own.sets import OwnImages, OwnPairs
from datasets.sampler import sample_generator
from datasets.text import TextEncoder
from datasets.transforms import FINETUNING_SCALE, EvalTransform, TrainTransform
from sparsity.errors import UserError

EXPECTED = '{"image": path, "caption": [text]}'
EXPECTED_PAIR = '{"image": path, "caption": text or [text], "image_id": text or number}'


class RetrievalEvalDataset(Dataset):
    """The images and captions of an annotation file such as `coco_test.json`.

    Item i is {"image": (3, H, W), "index": i}, or `Skipped` where the image cannot be read: whoever collects features
    puts them at their index and leaves the others NaN, which `recall` ranks worst.

    Attributes:
        images: image paths, (I,).
        image_ids: what the records call their images, None where they don't, (I,).
        texts: captions, (T,).
        img2txt: for each image the numbers of its captions.
        txt2img: for each caption the number of its image.

    Args:
        annotation_file, image_root: where the records and the images are.
        transform: RGB image -> tensor.
        limit: only the first so many images.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: the file or folder is missing, or none of the images looked up is in the folder.
        UserError: the annotation file is not as expected.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: Callable[[Image.Image], torch.Tensor],
        limit: int | None = None,
        decoding: Decoding = DEFAULT,
    ):
        records = read_records(annotation_file, parse_captioned, EXPECTED)[:limit]
        self.images = [path for path, _, _ in records]
        self.image_ids = [image_id for _, _, image_id in records]
        self.texts = [caption for _, captions, _ in records for caption in captions]
        self.txt2img = [i for i, (_, captions, _) in enumerate(records) for _ in captions]
        self.img2txt: list[list[int]] = [[] for _ in records]
        for t, i in enumerate(self.txt2img):
            self.img2txt[i].append(t)
        self.root, self.transform = ImageRoot(image_root, decoding), transform
        self.root.check(annotation_file, self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | Skipped:
        image = self.root.load(self.images[i])
        if isinstance(image, Skipped):
            return image
        return {"image": self.transform(image), "index": torch.tensor(i)}


class RetrievalTrainDataset(Dataset):
    """Image-caption pairs of annotation files such as `coco_train.json`, one item for each caption.

    It is indexed by a running number n = epoch * len(dataset) + index. An item is {"image": (3, H, W), **text fields,
    "sample_ids": number of the image}, or `Skipped` where the image cannot be read. Batches: `collate`.

    Args:
        annotation_files, image_root: where the records and the images are.
        transform: (RGB image, generator) -> tensor.
        encode: (caption, generator) -> text fields.
        seed: of all that is drawn.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: a file or the folder is missing, or none of the images looked up is in the folder.
        UserError: an annotation file is not as expected.
    """

    def __init__(
        self,
        annotation_files: Sequence[str | Path],
        image_root: str | Path,
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        encode: Callable[[str, np.random.Generator], dict[str, torch.Tensor]],
        *,
        seed: int,
        decoding: Decoding = DEFAULT,
    ):
        self.root, records = ImageRoot(image_root, decoding), []
        for file in annotation_files:
            found = read_records(file, parse_paired, EXPECTED_PAIR)
            self.root.check(file, [path for path, _, _ in found])
            records += found
        numbers: dict[str, int] = {}  # of the images, by what the file calls them
        pairs = ((path, text, numbers.setdefault(i, len(numbers))) for path, texts, i in records for text in texts)
        self.records = Records(pairs)
        self.transform, self.encode, self.seed = transform, encode, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        path, caption, number = self.records[index]
        image = self.root.load(path)
        if isinstance(image, Skipped):
            return image
        fields = self.encode(caption, rng)
        return {"image": self.transform(image, rng), **fields, "sample_ids": torch.tensor(number)}


def training_set(config: RetrievalConfig, encode: TextEncoder, side: int, seed: int) -> Dataset:
    """Return the data that the configuration trains on, images of `side` pixels: the user's data, the bundled scenes or
    annotated files.
    """
    fields = partial(encode, masked=False)
    if config.bundled:
        return BundledScenes(load_glyphs(), fields, config.bundled.train_scenes, side=side, seed=seed)
    transform = TrainTransform(side, scale=FINETUNING_SCALE)
    if config.data:
        return OwnPairs(own_captions(config)[0], partial(as_item, transform, fields), seed=seed)
    reading = {"seed": seed, "decoding": config.decoding}
    return RetrievalTrainDataset(config.train_file, config.image_root, transform, fields, **reading)


def as_item(
    transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
    encode: Callable[[str, np.random.Generator], dict[str, torch.Tensor]],
    image: Image.Image,
    caption: str,
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """Return an image with one of its captions as it is trained on."""
    fields = encode(caption, rng)
    return {"image": transform(image, rng), **fields}


def own_evaluation(config: RetrievalConfig, side: int, debug: bool = False) -> OwnImages | None:
    """Return the user's images that are held out, of `side` pixels, with their captions; None without any."""
    held = own_captions(config)[1] if config.data else None
    return None if held is None else OwnImages(held, EvalTransform(side), DEBUG_IMAGES if debug else None)


def parse_paired(record: dict) -> tuple[str, list[str], str]:
    """Image path, captions, and what tells the image from others: its `image_id`, or its path where it has none."""
    path, image_id = get_path(record), get_id(record)
    return path, get_texts(record, "caption"), path if image_id is None else str(image_id)


def parse_captioned(record: dict) -> tuple[str, list[str], int | str | None]:
    """Image path, captions, and `image_id`, None where there is none."""
    return get_path(record), get_texts(record, "caption"), get_id(record)


def recall(
    scores_i2t: torch.Tensor,
    scores_t2i: torch.Tensor,
    txt2img: Sequence[int],
    img2txt: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recalls in per cent.

    A query counts as found at k if one of its matches is among the k best candidates. Equal scores count against the
    match and NaN is worse than everything, so that a collapsed model scores nothing by luck.

    Args:
        scores_i2t: (I, T), the score of every text for an image.
        scores_t2i: (T, I), the score of every image for a text.
        txt2img: for each text the number of its image.
        img2txt: for each image the numbers of its texts.

    Returns:
        `txt_r{k}` (image to text), `img_r{k}` (text to image), `txt_r_mean`, `img_r_mean` and `r_mean`.
    """
    images, texts = len(img2txt), len(txt2img)
    if tuple(scores_i2t.shape) != (images, texts) or tuple(scores_t2i.shape) != (texts, images):
        raise UserError(
            f"scores must be ({images}, {texts}) and ({texts}, {images}) for {images} images and {texts} texts, "
            f"got {tuple(scores_i2t.shape)} and {tuple(scores_t2i.shape)}"
        )
    owner = torch.repeat_interleave(torch.tensor([len(own) for own in img2txt]))  # of each match
    ranks = {
        "txt": _ranks(scores_i2t, owner, torch.tensor([t for own in img2txt for t in own])),
        "img": _ranks(scores_t2i, torch.arange(texts), torch.as_tensor(txt2img)),
    }
    metrics = {f"{name}_r{k}": 100 * (rank < k).float().mean().item() for name, rank in ranks.items() for k in ks}
    for name in ranks:
        metrics[f"{name}_r_mean"] = sum(metrics[f"{name}_r{k}"] for k in ks) / len(ks)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


def _ranks(scores: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Rank (Q,), from 0, of the best match of each query among the candidates that do not match; infinite where the
    scores of its matches are NaN.

    scores: (Q, C). queries, candidates: (M,), which of them match.
    """
    matched = scores[queries, candidates]
    nan = matched.isnan()
    matched = matched.masked_fill(nan, -torch.inf)
    none = matched.new_full((len(scores),), -torch.inf)
    best = none.scatter_reduce(0, queries, matched, "amax")
    ahead = (scores >= best[:, None]).sum(1)
    lowest = best == -torch.inf
    if lowest.any():  # NaN is no better
        ahead[lowest] = scores.shape[1]
    level = torch.zeros_like(ahead).index_add(0, queries, (matched >= best[queries]).long())
    found = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, queries[~nan], True)
    return torch.where(found, (ahead - level).float(), torch.inf)
