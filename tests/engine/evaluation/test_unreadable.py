"""An image that cannot be read counts as a wrong answer in every metric.

A model that is always right scores the share of images that can be read.
"""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import Dataset

from datasets.collate import Skipped, collate
from datasets.tasks.captioning_metrics import CaptionScorer
from datasets.tasks.retrieval import recall
from datasets.vqa_accuracy import Asked
from engine.evaluation.captioning import Captions
from engine.evaluation.classification import Accuracy
from engine.evaluation.vqa import Answers

COUNT, BROKEN = 12, (2, 3, 11)
SHARE = 100 * (COUNT - len(BROKEN)) / COUNT
WORDS = [
    f"the {name} one"
    for name in ["red", "green", "blue", "black", "white", "grey", "pink", "brown", "cyan", "gold", "plum", "rose"]
]


class Images(Dataset):
    """Image i is the number i, which is its label, its caption and the answer to its question."""

    ids, references = range(COUNT), [[text] for text in WORDS]
    asked = [Asked(i, (WORDS[i],)) for i in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        if i in BROKEN:
            return Skipped(f"{i}.jpg", "damaged")
        return {
            "image": torch.full((3, 2, 2), float(i)),
            **dict.fromkeys(("index", "label", "number"), torch.tensor(i)),
        }

    class words:  # noqa: N801 (as the data set has it)
        gather_asked = staticmethod(collate)

        @staticmethod
        def answer(text):
            return [0, WORDS.index(text)]

        @staticmethod
        def padded(name, texts):
            return {"answer_ids": torch.tensor(texts), "answer_atts": torch.ones(len(texts), 2)}


class Right(nn.Module):
    def classify(self, image):
        return torch.eye(COUNT)[image[:, 0, 0, 0].long()]

    def generate(self, image, max_length):
        return torch.stack([torch.ones(len(image)), image[:, 0, 0, 0] + 1], 1).long()


class Answering(Answers):
    def _rank(self, batch, encoded):
        return batch["image"][:, 0, 0, 0].long()


def classification(common):
    return Accuracy(Right(), Images(), *common, max_skipped=0.5)()["top1"]


def vqa(common):
    return Answering(Right(), Images(), WORDS, *common, k_test=4, batch_size=5, max_skipped=0.5)()["accuracy"]


def captioning(common):
    options = {"batch_size": 5, "generation": {"max_length": 2}, "max_skipped": 0.5}
    decode = lambda ids: WORDS[ids[1] - 1]  # noqa: E731
    scores = CaptionScorer(java=False)
    return Captions(Right(), Images(), decode, *common, score=scores, **options)()["rouge_l_own_tokens"]


def retrieval(way):
    scores = torch.eye(COUNT)
    scores[list(BROKEN)] = torch.nan
    return recall(scores, scores.t(), range(COUNT), [[i] for i in range(COUNT)])[f"{way}_r1"]


METRICS = {
    "classification": classification,
    "vqa": vqa,
    "captioning": captioning,
    "image to text": lambda _: retrieval("txt"),
    "text to image": lambda _: retrieval("img"),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_what_cannot_be_read_is_wrong(metric, tmp_path):
    assert metric((Fabric(accelerator="cpu", devices=1), tmp_path)) == pytest.approx(SHARE)
