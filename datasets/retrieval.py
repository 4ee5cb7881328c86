"""Image-text retrieval: the evaluation set and its recalls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.annotations import ImageRoot, get_text, get_texts, read_records
from datasets.collate import Skipped

EXPECTED = '{"image": path, "caption": [text]}'


class RetrievalEvalDataset(Dataset):
    """The images and captions of an annotation file such as `coco_test.json`.

    Item i is {"image": (3, H, W), "index": i}, or `Skipped` where the image cannot be read: whoever collects features
    puts them at their index and leaves the others NaN, which `recall` ranks worst.

    Attributes:
        images: image paths, (I,).
        texts: captions, (T,).
        img2txt: for each image the numbers of its captions.
        txt2img: for each caption the number of its image.

    Args:
        annotation_file, image_root: where the records and the images are.
        transform: RGB image -> tensor.

    Raises:
        FileNotFoundError: the file or folder is missing, or none of the images looked up is in the folder.
        ValueError: the annotation file is not as expected.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_root: str | Path,
        transform: Callable[[Image.Image], torch.Tensor],
    ):
        records = read_records(annotation_file, parse_captioned, EXPECTED)
        self.images = [path for path, _ in records]
        self.texts = [caption for _, captions in records for caption in captions]
        self.txt2img = [i for i, (_, captions) in enumerate(records) for _ in captions]
        self.img2txt: list[list[int]] = [[] for _ in records]
        for t, i in enumerate(self.txt2img):
            self.img2txt[i].append(t)
        self.root, self.transform = ImageRoot(image_root), transform
        self.root.check(annotation_file, self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | Skipped:
        image = self.root.load(self.images[i])
        if isinstance(image, Skipped):
            return image
        return {"image": self.transform(image), "index": torch.tensor(i)}


def parse_captioned(record: dict) -> tuple[str, list[str]]:
    """Image path and captions."""
    return get_text(record, "image"), get_texts(record, "caption")


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
        raise ValueError(
            f"scores must be ({images}, {texts}) and ({texts}, {images}) for {images} images and {texts} texts, "
            f"got {tuple(scores_i2t.shape)} and {tuple(scores_t2i.shape)}"
        )
    ranks = {
        "txt": torch.stack([_rank(row, torch.as_tensor(own)) for row, own in zip(scores_i2t, img2txt, strict=True)]),
        "img": torch.stack([_rank(row, torch.as_tensor([i])) for row, i in zip(scores_t2i, txt2img, strict=True)]),
    }
    metrics = {f"{name}_r{k}": 100 * (rank < k).float().mean().item() for name, rank in ranks.items() for k in ks}
    for name in ranks:
        metrics[f"{name}_r_mean"] = sum(metrics[f"{name}_r{k}"] for k in ks) / len(ks)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


def _rank(scores: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Rank (from 0) of the best match among the candidates that do not match; infinite where its score is NaN."""
    nan = scores.isnan()
    scores = scores.masked_fill(nan, -torch.inf)
    best = scores[matches].max()
    ahead = (scores >= best).sum() - (scores[matches] >= best).sum()
    return torch.where(nan[matches].all(), torch.inf, ahead.float())
