"""BLIP for retrieval: its losses against plain formulas, its queues and copies, its names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from engine.training.finetuning import read_masks
from models.blip import model as blip
from models.blip import retrieval as blip_retrieval
from sparsity.masks import Masks
from tests.conftest import BLIP_CONFIG, SMALL_BLIP

KEYS = json.loads(Path("tests/data/checkpoints/BLIPRetrieval.json").read_text())
FILE = SMALL_BLIP / "state_dict.safetensors"


@pytest.fixture
def model():
    return blip_retrieval.build(BLIP_CONFIG, FILE).eval()


@pytest.fixture
def batch(blip_batches):
    return blip_batches["general"][0] | {"sample_ids": torch.tensor([3, 5, 3, 9])}


def test_keys_and_shapes_are_the_published_ones():
    sizes = dataclasses.replace(blip.Config(), vision=blip.VisionConfig(image_size=384))
    with torch.device("meta"):
        full = blip_retrieval.BLIPRetrieval(sizes)
    assert {name: list(tensor.shape) for name, tensor in full.state_dict().items()} == KEYS


def test_outputs_are_those_of_the_pretrained_model(model, batch):
    pretrained = blip.prunable_view(blip.build(BLIP_CONFIG, FILE).eval()).outputs(batch)
    own = blip_retrieval.prunable_view(model).outputs(batch)
    assert set(own) == set(pretrained) - {"words"}
    for name, output in own.items():
        torch.testing.assert_close(output.tensor, pretrained[name].tensor)


def test_the_pretrained_weights_and_copies_are_taken_over(model):
    published = load_file(FILE)
    for name, tensor in model.state_dict().items():
        if name in published:
            assert torch.equal(tensor, published[name]), name
    assert (model.idx_queue == blip_retrieval.NO_SAMPLE).all() and int(model.ptr_queue) == 0


def naive(model, batch, alpha, negatives):
    """The losses with the copies and queues as they are, written out pair by pair."""
    ids, atts, samples = batch["text_ids"], batch["text_atts"], batch["sample_ids"].tolist()
    image, image_feat = model.encode_image(batch["image"])
    grounded, text_feat = model.encode_text(ids, atts)
    image_m, text_m = model.momentum_features(batch["image"], ids, atts)
    known = samples + model.idx_queue[0].tolist()
    itc = 0.0
    for query, teacher, keys, queue in (
        (image_feat, image_m, text_m, model.text_queue),
        (text_feat, text_m, image_m, model.image_queue),
    ):
        everything = torch.cat([keys, queue.t()])
        for i, sample in enumerate(samples):
            same = torch.tensor([float(other == sample) for other in known])
            soft = (everything @ teacher[i] / model.temp).softmax(0)
            target = alpha * soft + (1 - alpha) * same / same.sum()
            itc = itc - (target * (everything @ query[i] / model.temp).log_softmax(0)).sum() / len(samples) / 2
    pairs = [(i, i, 1) for i in range(4)]
    pairs += [(i, j, 0) for i, j in enumerate(negatives[0])] + [(j, i, 0) for i, j in enumerate(negatives[1])]
    itm = 0.0
    for text, picture, label in pairs:
        logits = model.match(grounded[[text]], atts[[text]], image[[picture]])
        itm = itm + F.cross_entropy(logits, torch.tensor([label])) / len(pairs)
    return itc, itm


@pytest.mark.parametrize("epoch", [0.0, 0.25, 7.0])
def test_losses_equal_plain_formulas(model, batch, monkeypatch, epoch):
    model.idx_queue[0, 2] = 5  # the same sample, queued before
    monkeypatch.setattr(model, "update_momentum", lambda: None)
    negatives = [1, 2, 1, 0], [3, 0, 1, 2]
    drawn = tuple(map(torch.tensor, negatives))
    monkeypatch.setattr(blip_retrieval, "draw_negatives", lambda *_, **__: drawn)
    with torch.no_grad():
        itc, itm = naive(model, batch, 0.4 * min(1.0, epoch), negatives)
        losses = model(batch, epoch=epoch)
    torch.testing.assert_close(losses["itc"], itc)
    torch.testing.assert_close(losses["itm"], itm)
    assert model.idx_queue[0, :4].tolist() == batch["sample_ids"].tolist() and int(model.ptr_queue) == 4


def test_a_sample_is_no_negative_of_itself(model, batch, monkeypatch):
    drawn = []
    real = blip_retrieval.draw_negatives
    monkeypatch.setattr(blip_retrieval, "draw_negatives", lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1])
    for seed in range(10):
        with torch.no_grad():
            model(batch, generator=torch.Generator().manual_seed(seed))
    ids = batch["sample_ids"]
    assert len(drawn) == 10 and all((ids[wrong] != ids).all() for pair in drawn for wrong in pair)


def test_momentum_copies_begin_at_the_pruned_weights(model, batch):
    view = blip_retrieval.prunable_view(model)
    Masks({name: weight.parameter.detach() > 0 for name, weight in view.weights.items()}).apply(view)
    model.on_pruned()
    for module, average in model.pairs_with_copies:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), average.parameters(), strict=True))
    model(batch)
    for name, weight in view.weights.items():
        copy = model.get_parameter(name.replace("encoder.", "encoder_m.", 1))
        assert (copy[weight.parameter == 0] == 0).all()


def test_masks_of_the_pretrained_model_hold_what_retrieval_has(model, tmp_path):
    trunk = blip.prunable_view(blip.build(BLIP_CONFIG, FILE))
    masks = Masks(
        {name: w.parameter.detach() > 0 for name, w in trunk.weights.items()},
        aliases={name: w.aliases for name, w in trunk.weights.items()},
    )
    masks.save(tmp_path / "trunk.safetensors")
    view = blip_retrieval.prunable_view(model)
    held = read_masks(tmp_path / "trunk.safetensors", view, blip_retrieval.task_names)
    assert list(held) == [name for name in trunk.weights if not name.startswith("text_decoder.")]
    held.apply(view)
    assert all((weight.parameter >= 0).all() for weight in view.weights.values())


def next_pair(rows, _, ids, pool, **options):
    """In place of a draw: the pair that follows, so that one process and two have the same negatives."""
    following = (torch.stack([(pool == i).nonzero()[0, 0] for i in ids]) + 1) % len(pool)
    return following, following


def one_rank(rank, address, results, batch):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    blip_retrieval.draw_negatives = next_pair
    model = blip_retrieval.build(BLIP_CONFIG, FILE).eval()
    replica = DistributedDataParallel(model)  # it must outlive the backward pass
    replica.broadcast_buffers = False  # as in retrieval.py: each rank fills its own queues with the features of all
    own = {name: tensor.chunk(2)[rank] for name, tensor in batch.items()}
    losses = replica(own)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {"itm": losses["itm"].detach(), "queue": model.image_queue.clone(), "ids": model.idx_queue.clone()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        optimizer.step()
        model.on_step()
        optimizer.zero_grad()
        replica(own)["loss"].backward()
    found["state"] = model.state_dict()
    torch.save(found | {"matching": gradients["itm_head.weight"]}, f"{results}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_match_all_pairs_and_queue_all_features(tmp_path, batch, monkeypatch):
    batch = batch | {"sample_ids": torch.arange(4)}
    multiprocessing.spawn(one_rank, (f"file://{tmp_path}/store", str(tmp_path), batch), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    monkeypatch.setattr(blip_retrieval, "draw_negatives", next_pair)
    model = blip_retrieval.build(BLIP_CONFIG, FILE).eval()
    losses = model(batch)
    losses["loss"].backward()
    torch.testing.assert_close(sum(found["itm"] for found in ranks) / 2, losses["itm"].detach())
    torch.testing.assert_close(ranks[0]["matching"], model.itm_head.weight.grad, rtol=1e-4, atol=1e-6)
    for found in ranks:
        torch.testing.assert_close(found["queue"], model.image_queue)
        assert torch.equal(found["ids"], model.idx_queue)
    for name, tensor in ranks[0]["state"].items():  # four steps later the ranks are still one model
        assert torch.equal(tensor, ranks[1]["state"][name]), name
