"""Two towers: their loss is the one that transformers has for the kind, on one process and two; equal images match."""

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from torch import distributed
from torch.nn import functional as F

from models.foreign.retrieval import MOST, TwoTowers, prunable_view
from tests import tiny_models
from tests.tiny_models import batch_for, image_processor, save, tokenizer

pytestmark = pytest.mark.script  # long: left out of make test-fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("models"), {}
    for kind in ("clip", "siglip"):
        torch.manual_seed(0)
        processor = transformers.CLIPProcessor(image_processor(), tokenizer())
        found[kind] = save(tiny_models.TRANSFORMERS[kind](), folder / kind, processor)
    return found


def towers(kind, folder):
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return TwoTowers(model, f"hf:{folder}")


def batch_of(kind, count=4):
    first, second = (batch_for(kind, seed) for seed in range(2))
    return {name: torch.cat([first[name], second[name]])[:count] for name in first if name != "return_loss"}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loss_and_gradients_are_those_of_transformers(folders, kind):
    model, batch = towers(kind, folders[kind]), batch_of(kind)
    with torch.no_grad():
        model.model.logit_scale.fill_(1.5)
    loss = model(batch)["loss"]
    loss.backward()
    own = gradients(model.model)
    model.zero_grad()
    theirs = model.model(**batch, return_loss=True).loss
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model.model).items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-6)


def test_captions_of_one_image_are_no_negatives(folders):
    ids = torch.tensor([0, 0, 1, 2])
    same = ids[:, None] == ids
    for kind, folder in folders.items():
        model, batch = towers(kind, folder), batch_of(kind)
        image, text = model.encode_images(batch), model.encode_texts(batch)
        logits = text @ image.t() * model.model.logit_scale.exp()
        if kind == "siglip":
            logits = logits + model.model.logit_bias
            wanted = -F.logsigmoid(torch.where(same, logits, -logits)).sum() / 4
        else:
            share = same / same.sum(1, keepdim=True)
            wanted = sum(-(share * rows.log_softmax(1)).sum(1).mean() for rows in (logits, logits.t())) / 2
        found = model({**batch, "sample_ids": ids})["loss"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_scale_of_clip_stays_below_a_hundred(folders):
    for kind, folder in folders.items():
        model = towers(kind, folder)
        model.model.logit_scale.data.fill_(7.0)
        model.on_step()
        assert model.model.logit_scale.item() == pytest.approx(MOST if kind == "clip" else 7.0)


def test_the_view_runs_batches_of_the_task(folders):
    model = towers("clip", folders["clip"])
    view, batch = prunable_view(model), {**batch_of("clip"), "sample_ids": torch.arange(4)}
    assert set(view.outputs(batch)) == {"image_embeds", "text_embeds"}
    torch.testing.assert_close(view.loss(batch), model(batch)["loss"], rtol=1e-5, atol=1e-6)


def one_of_two(rank, folder, path, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = towers("clip", folder)
    model.model.requires_grad_(True)
    batch = {name: value[2 * rank : 2 * rank + 2] for name, value in batch_of("clip").items()}
    loss = model(batch | {"sample_ids": torch.tensor([[0, 1], [1, 2]][rank])})["loss"]
    loss.backward()
    found = gradients(model.model)
    for gradient in found.values():  # as DDP has it
        distributed.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save({"loss": loss.detach(), "gradients": found}, path)
    distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_have_the_loss_and_gradients_of_one(folders, tmp_path):
    mp.spawn(one_of_two, (folders["clip"], tmp_path / "two.pt", tmp_path / "store"), nprocs=2)
    two, model = torch.load(tmp_path / "two.pt"), towers("clip", folders["clip"])
    loss = model(batch_of("clip") | {"sample_ids": torch.tensor([0, 1, 1, 2])})["loss"]
    loss.backward()
    torch.testing.assert_close(two["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(model.model).items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
