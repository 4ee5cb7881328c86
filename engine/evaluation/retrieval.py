"""Zero-shot image-text retrieval: the recalls of a model on files or on the bundled scenes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from configs.decoding import Decoding
from configs.pruning import Evaluation
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.collate import Skipped, trim_text
from datasets.images import DEFAULT
from datasets.own.sets import OwnImages
from datasets.tasks.retrieval import RetrievalEvalDataset, recall
from datasets.text import TextEncoder
from datasets.transforms import CLIP, EvalTransform
from engine.evaluation.reranking import Share, retrieval_scores
from engine.evaluation.watched import own_batches
from engine.ranks import summed
from sparsity.errors import UserError

RECALLS = {f"{way} R@{k}": f"{prefix}_r{k}" for way, prefix in (("i2t", "txt"), ("t2i", "img")) for k in (1, 5, 10)}
READ = 32  # images read together
SHOWN = 12  # captions whose first picture is kept after each evaluation


class ZeroShot:
    """Recalls of a model, in per cent, as it is when this is called; the ranks share the images.

    encode: of the captions. vision: has the model's `image_size`, in pixels. Images that cannot be read are listed in
    `folder` and count as not found; more than `max_skipped` of them is an error. Encoders run as autocast says, the
    scores of pairs are float32. decoding: how image files become pictures. own: the user's images, in place of those
    that the evaluation names.

    Attributes:
        captions: (N,) texts. txt2img: (N,) the image of each.
        found: for each call, the images that the first `SHOWN` captions find.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Evaluation,
        encode: TextEncoder,
        fabric: Any,
        vision: Any,
        folder: Path,
        *,
        workers: int = 0,
        max_skipped: float = 0.01,
        decoding: Decoding = DEFAULT,
        own: OwnImages | None = None,
    ):
        self.model, self.evaluation, self.fabric = model, evaluation, fabric
        opened = _open(evaluation, vision.image_size, decoding) if own is None else _parts(own)
        self.items, self.captions, self.txt2img, self.img2txt = opened
        self.texts, self.found = trim_text(encode.plain(self.captions)), list[list[int]]()
        gather = partial(_stack, side=vision.image_size)
        reading = {"workers": workers, "max_skipped": max_skipped}
        found = own_batches(self.items, len(self.items), READ, gather, fabric, folder, **reading)
        self.images, self.skipped, self.own = found

    def __call__(self) -> dict[str, float]:
        scores = retrieval_scores(
            self.model,
            self._read(),
            self.texts,
            k_test=self.evaluation.k_test,
            device=self.fabric.device,
            share=Share(self.own, partial(summed, self.fabric)) if self.fabric.world_size > 1 else None,
            half=self.evaluation.half_tokens,
            progress=partial(self._progress, desc="re-ranking", unit="image"),
        )
        self.found.append(scores[1][:SHOWN].nan_to_num(-torch.inf).argmax(1).tolist())
        return recall(*scores, self.txt2img, self.img2txt)

    def picture(self, i: int) -> Tensor | None:
        """Return image i as the model sees it, (H, W, 3) uint8; None where it cannot be read."""
        item: Any = self.items[i]
        if isinstance(item, Skipped):
            return None
        mean, deviation = (torch.tensor(values)[:, None, None] for values in CLIP)
        colours = item["image"].to("cpu", torch.float32) * deviation + mean
        return (255 * colours).round().clamp(0, 255).byte().permute(1, 2, 0)

    def _read(self) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) of this rank's images, NaN for those that cannot be read."""
        self.skipped.count, failed = 0, None  # the same images at each call
        for batch in self._progress(self.images, desc="images"):
            try:
                self.skipped.add(batch["skipped"])
            except UserError as error:
                if self.fabric.world_size == 1:
                    raise
                failed = error
            yield batch["image"]
        self._agree(failed)

    def _agree(self, failed: UserError | None) -> None:
        """Raise on all ranks what one of them has found: none waits for one that is gone."""
        if int(summed(self.fabric, torch.tensor(float(failed is not None)))):
            raise failed or UserError("too many images of another rank cannot be read")

    def _progress(self, batches: Iterable, desc: str, unit: str = "batch") -> Iterable:
        return tqdm(batches, desc=desc, unit=unit, leave=False, disable=not self.fabric.is_global_zero)


def _open(
    evaluation: Evaluation, side: int, decoding: Decoding
) -> tuple[Dataset, list[str], list[int], list[list[int]]]:
    """Images, captions, and which belong together: for each caption its image, for each image its captions."""
    if evaluation.files:
        found = evaluation.files.annotations, evaluation.files.images
        return _parts(RetrievalEvalDataset(*found, EvalTransform(side), evaluation.limit, decoding))
    number = min(evaluation.bundled_scenes, evaluation.limit or evaluation.bundled_scenes)
    split, seed = evaluation.bundled_split, evaluation.bundled_seed
    scenes = BundledRetrieval(load_glyphs(), split, number, side=side, seed=seed)
    own = list(range(len(scenes)))
    return scenes, [scenes.scene(i).caption for i in own], own, [[i] for i in own]


def _parts(files: RetrievalEvalDataset | OwnImages) -> tuple[Dataset, list[str], list[int], list[list[int]]]:
    return files, files.texts, files.txt2img, files.img2txt


def _stack(items: Sequence[Mapping[str, Any] | Skipped], side: int) -> dict[str, Any]:
    """Images (B, 3, side, side), NaN where one cannot be read, and which those are."""
    unread = torch.full((3, side, side), torch.nan)
    images = [unread if isinstance(item, Skipped) else item["image"].to("cpu") for item in items]
    return {"image": torch.stack(images), "skipped": [item for item in items if isinstance(item, Skipped)]}
