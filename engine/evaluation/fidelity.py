"""How faithful a pruned model is to the dense one, without labels; and the usual numbers where there are labels.

On the first `MOST_ITEMS` items, against what the dense model made of them: the cosine of the features of each tower
(its last block's output, at up to `TOKENS` real tokens of an item), of its pooled output (what the head reads, averaged
over the real tokens; of a model that compares images with texts, its embeddings), how often the first prediction is the
same, and the Kullback-Leibler divergence KL(dense || pruned) of the predictions, in thousandths of a nat. On all items:
accuracy where they have classes, recall among all items where images are compared with texts, perplexity of the words
that are predicted.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.errors import UserError

MOST_ITEMS, TOKENS, POSITIONS = 256, 64, 16  # items; tokens of an item whose features, and whose logits are compared
MOST_LOGITS = 1 << 26  # of the dense model that are held, in float32
RECALLED = (1, 5)


class Probed(Protocol):
    """Declare what `models.external.probes.Probes` is."""

    towers: Any
    pooled: Any

    def real(self, group: str, batch: Any) -> Tensor | None: ...
    def run(self, batch: Any) -> Any: ...
    def embeddings(self, output: Any) -> dict[str, Tensor]: ...
    def predictions(self, output: Any, batch: Any) -> tuple[Tensor, Tensor | None, bool] | None: ...


class Fidelity:
    """Metrics of the model as it is when this is called; made while it is dense, which is what it is compared with.

    batches: read anew at each call; to_device: of a batch. arithmetic: a context in which the model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Probed,
        batches: Iterable[Any],
        *,
        to_device: Callable[[Any], Any],
        arithmetic: Callable[[], AbstractContextManager[Any]],
    ):
        self.model, self.probes, self.batches = model, probes, batches
        self.to_device, self.arithmetic = to_device, arithmetic
        self.dense: list[dict[str, Tensor]] = []
        items, room = 0, MOST_LOGITS
        for seen, _, size in self._read():
            if items >= MOST_ITEMS:
                break
            items += size
            room -= seen["logits"].numel() if "logits" in seen else 0
            kept = {
                name: tensor.cpu() for name, tensor in seen.items() if name != "logits" or room >= 0 or not self.dense
            }
            self.dense.append(kept)
        if not self.dense:
            raise UserError("--evaluate: there is no batch to evaluate on")
        self.measures = list(self())

    def __call__(self) -> dict[str, float]:
        begin, sums, task = time.perf_counter(), defaultdict(float), _Task()
        for dense, (seen, labelled, _) in zip_longest(self.dense, self._read(), fillvalue={}):
            task.add(labelled)
            for name in dense:
                _compare(name, dense[name].to(seen[name].device), seen[name], sums)
        found = {name: sums[name] / sums[f"{name} rows"] for name in sums if not name.endswith(" rows")}
        return found | task.metrics() | {"eval s": time.perf_counter() - begin}

    def _read(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Any], int]]:
        """For each batch what is compared, what has labels, and how many items it has."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.arithmetic():
                for batch in self.batches:
                    yield self._look(self.to_device(batch))
        finally:
            self.model.train(training)

    def _look(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Any], int]:
        probes, size = self.probes, _size(batch)
        with _outputs(probes.towers) as features, _inputs(probes.pooled) as read:
            output = probes.run(batch)
        many = len(features) > 1
        seen: dict[str, Tensor] = {}
        for group, found in features.items():
            rows = [_rows(tensor, probes.real(group, batch), TOKENS) for tensor in found]
            seen[f"cos {group} %" if many else "cos %"] = torch.cat(rows)
        embedded = probes.embeddings(output)
        for tower, tensor in embedded.items():
            seen[f"pooled {tower} %"] = tensor.float()
        if not embedded:
            for head, found in read.items():
                pooled = torch.cat([_pooled(tensor, _mask_of(batch)) for tensor in found])
                seen["pooled %" if len(read) == 1 else f"pooled {head} %"] = pooled
        labelled: dict[str, Any] = {"embeddings": embedded, "texts": _texts(batch)} if len(embedded) == 2 else {}
        predicted = probes.predictions(output, batch)
        if predicted:
            logits, labels, words = predicted
            where = labels != -100 if labels is not None and words else _mask_of(batch)
            seen["logits"] = _rows(logits, where, POSITIONS)
            if labels is not None:
                labelled |= {"words" if words else "classes": (logits, labels)}
        return seen, labelled, size


class _Task:
    """Adds up what has labels."""

    def __init__(self) -> None:
        self.hits: dict[str, int] = defaultdict(int)
        self.items = self.words = 0
        self.nll = 0.0
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.captions: list[Any] = []

    def add(self, found: dict[str, Any]) -> None:
        if "classes" in found:
            logits, labels = found["classes"]
            first = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # (B, 5)
            self.hits["top-1"] += int(first[:, 0].sum())
            self.hits["top-5"] += int(first.any(1).sum())
            self.items += len(labels)
        if "words" in found:
            for logits, labels in zip(*found["words"], strict=True):  # an item at a time: all logits are large
                kept = labels != -100
                self.nll += float(F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
                self.words += int(kept.sum())
        if "embeddings" in found:
            self.images.append(found["embeddings"]["vision"].float().cpu())
            self.texts.append(found["embeddings"]["text"].float().cpu())
            self.captions += found["texts"]

    def metrics(self) -> dict[str, float]:
        found = {name: 100 * hits / self.items for name, hits in self.hits.items()}
        if self.words:
            found["perplexity"] = math.exp(min(self.nll / self.words, 700.0))
        if self.images:
            images, texts = (F.normalize(torch.cat(each), dim=1) for each in (self.images, self.texts))
            found |= _recalls(images @ texts.T, self.captions)
        return found


def _recalls(scores: Tensor, captions: list[Any]) -> dict[str, float]:
    """Recall in per cent of scores (images, texts), both ways; images with the same text are each other's answers."""
    same = torch.tensor([[a == b for b in captions] for a in captions])
    found = {}
    for way, table in (("i2t", scores), ("t2i", scores.T)):
        best = table.masked_fill(~same, -torch.inf).max(dim=1, keepdim=True).values
        before = ((table > best) & ~same).sum(dim=1)  # wrong ones that are ranked above the first right one
        found |= {f"{way} R@{k}": 100 * float((before < k).double().mean()) for k in RECALLED}
    return found


def _compare(name: str, dense: Tensor, now: Tensor, sums: dict[str, float]) -> None:
    """Add up a measure of rows of the dense model and of the model as it is."""
    if name != "logits":
        sums[name] += 100 * float(F.cosine_similarity(dense.double(), now.double(), dim=-1).sum())
        sums[f"{name} rows"] += len(dense)
        return
    before, after = dense.double().log_softmax(-1), now.double().log_softmax(-1)
    sums["agree %"] += 100 * int((before.argmax(-1) == after.argmax(-1)).sum())
    sums["KL mnat"] += 1000 * float(F.kl_div(after, before, reduction="sum", log_target=True))
    for measure in ("agree %", "KL mnat"):
        sums[f"{measure} rows"] += len(dense)


def _rows(tensor: Tensor, real: Tensor | None, most: int) -> Tensor:
    """(B, d), (B, T, d) or another (B, ...) -> float32 rows to compare: at most `most` real tokens of an item, evenly;
    one row an item where there are no tokens (maps of features).
    """
    if tensor.ndim == 2:
        return tensor.float()
    if tensor.ndim != 3:
        return tensor.flatten(1).float()
    if real is None or real.shape != tensor.shape[:2]:
        places = torch.linspace(0, tensor.shape[1] - 1, min(most, tensor.shape[1])).long().to(tensor.device)
        return tensor[:, places].flatten(0, 1).float()
    found = []
    for item, own in zip(tensor, real, strict=True):
        places = own.nonzero()[:, 0]
        few = torch.linspace(0, len(places) - 1, min(most, len(places))).long().to(places.device)
        found.append(item[places[few]])
    return torch.cat(found).float()


def _pooled(tensor: Tensor, real: Tensor | None) -> Tensor:
    """(B, d) or (B, T, d) -> (B, d), the mean over real tokens; other shapes are flattened."""
    if tensor.ndim != 3:
        return tensor.flatten(1).float()
    if real is None or real.shape != tensor.shape[:2]:
        return tensor.float().mean(1)
    weight = real[..., None].float()
    return (tensor.float() * weight).sum(1) / weight.sum(1).clamp_min(1)


@contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what these modules put out inside the block, name -> a tensor for each call."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        tensor = _first(output)
        if tensor is not None:
            found.setdefault(name, []).append(tensor)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(lambda m, a, out, name=name: keep(name, out)).remove)
        yield found


@contextmanager
def _inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what these modules read inside the block, name -> a tensor for each call."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, args: tuple) -> None:
        found.setdefault(name, []).extend(args[:1])

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(lambda m, args, name=name: keep(name, args)).remove)
        yield found


def _first(value: Any) -> Tensor | None:
    """The first tensor in an output."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((found for found in map(_first, values) if found is not None), None)


def _size(batch: Any) -> int:
    tensor = _first(batch)
    return 1 if tensor is None or tensor.ndim == 0 else len(tensor)


def _mask_of(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    return None if mask is None else mask != 0


def _texts(batch: Any) -> list[tuple[int, ...]]:
    """The token ids of each text, padding apart, by which equal ones are known."""
    ids, mask = batch["input_ids"], _mask_of(batch)
    if mask is None:
        return [tuple(row.tolist()) for row in ids]
    return [tuple(row[own].tolist()) for row, own in zip(ids, mask, strict=True)]
