"""XVLM for retrieval: known answers, the pretrained checkpoint's names, negatives of one process and of two."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import models
from engine.training.finetuning import checkpoint_blocks, read_masks
from models.parts.clip_vision import VisionConfig
from models.xvlm import model as xvlm
from models.xvlm import retrieval as xvlm_retrieval
from sparsity.masks import Masks
from tests.conftest import CONFIG, SMALL

KNOWN = Path("tests/data/tasks_small/xvlm_retrieval")
KEYS = json.loads(Path("tests/data/checkpoints/XVLMRetrieval.json").read_text())
WIDE = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, image_size=64))  # pretrained on 48 x 48


@pytest.fixture
def model():
    """The pretrained model as retrieval takes it, on larger images."""
    return xvlm_retrieval.build(WIDE, SMALL / "state_dict.safetensors").eval()


@pytest.fixture
def batch():
    inputs = load_file(KNOWN / "inputs.safetensors")
    return {name: inputs[name] for name in ("image", "text_ids", "text_atts")} | {"sample_ids": inputs["idx"]}


def test_outputs_are_those_of_the_pretrained_model(batch):
    small = batch | {"image": batch["image"][:, :, :48, :48]}
    both = (module.build(CONFIG, SMALL / "state_dict.safetensors").eval() for module in (xvlm_retrieval, xvlm))
    views = xvlm_retrieval.prunable_view(next(both)), xvlm.prunable_view(next(both))
    own, pretrained = (view.outputs(small) for view in views)
    assert set(own) == set(pretrained)
    for name, output in own.items():
        torch.testing.assert_close(output.tensor, pretrained[name].tensor)


@pytest.mark.parametrize("named", [True, False])
def test_known_answers(model, batch, named):
    """From the pretrained checkpoint, its positions interpolated, pruned at 75 %."""
    info, expected = json.loads((KNOWN / "info.json").read_text()), load_file(KNOWN / "outputs.safetensors")
    view = xvlm_retrieval.prunable_view(model)
    read_masks(KNOWN / "masks.safetensors", view, xvlm_retrieval.task_names).apply(view)
    given = batch if named else {name: value for name, value in batch.items() if name != "sample_ids"}
    torch.manual_seed(info["seed"])
    with torch.no_grad():
        losses = model(given)
    suffix = "" if named else "_noidx"
    for name in ("itc", "itm"):
        assert losses[name].item() == pytest.approx(expected[f"loss_{name}{suffix}"].item(), rel=1e-5)
    assert losses["loss"] == losses["itc"] + losses["itm"]
    tokens, image_feat = model.encode_image(batch["image"])
    states, text_feat = model.encode_text(batch["text_ids"], batch["text_atts"])
    scores = model.match(states, batch["text_atts"], tokens).softmax(1)
    torch.testing.assert_close(scores, expected["itm_scores"], rtol=1e-5, atol=1e-6)
    similarity = (image_feat @ text_feat.t() * model.temp.exp()).detach()  # as the published code scales it
    torch.testing.assert_close(similarity, expected["base_logits_per_image"], rtol=1e-5, atol=1e-6)


def test_keys_and_shapes_are_the_published_ones():
    sizes = dataclasses.replace(xvlm.Config(), vision=VisionConfig(image_size=384))
    with torch.device("meta"):
        full = xvlm_retrieval.XVLMRetrieval(sizes)
    assert {name: list(tensor.shape) for name, tensor in full.state_dict().items()} == KEYS


def test_a_checkpoint_of_the_task_loads_as_well(model, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    again = xvlm_retrieval.build(WIDE, tmp_path / "w.safetensors")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_of_another_model_are_refused(tmp_path):
    state = load_file(SMALL / "state_dict.safetensors")
    missing = "text_encoder.bert.encoder.layer.0.output.dense.weight"
    save_file({name: tensor for name, tensor in state.items() if name != missing}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="1 missing: text_encoder.encoder.layer.0.output.dense.weight"):
        xvlm_retrieval.build(CONFIG, tmp_path / "w.safetensors")


def test_what_is_prunable_is_so_in_the_pretrained_model(model):
    trunk = xvlm.prunable_view(xvlm.build(CONFIG)).weights
    own = xvlm_retrieval.prunable_view(model).weights
    assert [xvlm_retrieval.task_names(name) for name in trunk] == [(name,) for name in own]
    assert [weight.group for weight in trunk.values()] == [weight.group for weight in own.values()]


def test_masks_of_the_pretrained_model_and_of_the_task_hold_the_same_weights(model, tmp_path):
    trunk = xvlm.prunable_view(xvlm.build(CONFIG, SMALL / "state_dict.safetensors"))
    masks = Masks({name: w.parameter.detach() > 0 for name, w in trunk.weights.items()}, {"pruner": "sign"})
    masks.save(tmp_path / "trunk.safetensors")
    view = xvlm_retrieval.prunable_view(model)
    held = read_masks(tmp_path / "trunk.safetensors", view, xvlm_retrieval.task_names)
    held.apply(view)
    assert all((weight.parameter >= 0).all() for weight in view.weights.values())
    assert held.kept == masks.kept and held.provenance == {"pruner": "sign"}
    held.save(tmp_path / "task.safetensors")
    again = read_masks(tmp_path / "task.safetensors", view, xvlm_retrieval.task_names)
    assert again.digest() == held.digest()


def test_a_mask_of_another_model_is_refused_with_the_first_names(model, tmp_path):
    narrow = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, width=24))
    other = xvlm.prunable_view(xvlm.build(narrow))
    masks = Masks({name: torch.ones_like(w.parameter, dtype=torch.bool) for name, w in other.weights.items()})
    masks.save(tmp_path / "m.safetensors")
    told = (
        r"--mask .*m.safetensors: the masks do not fit this model: \d+ misshapen: text_encoder.encoder.layer.0.*query"
    )
    with pytest.raises(ValueError, match=told):
        read_masks(tmp_path / "m.safetensors", xvlm_retrieval.prunable_view(model), xvlm_retrieval.task_names)


MASK_KEYS = json.loads(Path("tests/data/checkpoints/mask_file_keys_xvlm.json").read_text())


@pytest.mark.parametrize("task", ["retrieval", "captioning", "captioning_pretrain", "vqa"])
@pytest.mark.script
def test_a_public_mask_file_is_for_every_task(tmp_path, task):
    """With all keys of the published files, also those of heads and layers that the task does not have."""
    vision = dataclasses.replace(CONFIG.vision, layers=12, width=16, heads=2, mlp_width=16)
    text = dataclasses.replace(CONFIG.text, layers=12, width=16, heads=2, mlp_width=16)
    sizes = dataclasses.replace(CONFIG, vision=vision, text=text)
    trunk = xvlm.build(sizes)
    shapes = {name: tensor.shape for name, tensor in trunk.state_dict().items()}
    shapes["text_encoder.cls.predictions.decoder.bias"] = (text.vocab_size,)
    pruned, public = set(xvlm.prunable_view(trunk).weights), {}
    for key in MASK_KEYS:
        name = key.removesuffix("_pruning_mask")
        public[key] = (torch.rand(shapes[name]) > 0.6 * (name in pruned)).float()
    torch.save(public, tmp_path / "public.pth")
    module = models.find_task("xvlm", task)
    marks = {} if task in ("retrieval", "vqa") else {"prompt": (3,), "end": 4}
    view = module.prunable_view(module.build(sizes, **marks))
    held = read_masks(tmp_path / "public.pth", view, module.task_names)
    assert len(held) == len(pruned)
    for name in pruned:
        (own,) = module.task_names(name)
        assert torch.equal(held[own], public[name + "_pruning_mask"].bool()), name


def test_without_a_negative_all_parameters_still_take_part(model, batch):
    losses = model(batch | {"sample_ids": torch.zeros(4, dtype=torch.long)})
    assert losses["itm"] == 0
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all((p.grad == 0).all() for p in model.itm_head.parameters())


def test_checkpointed_blocks_give_the_same_gradients(batch):
    gradients = []
    for checkpointed in (False, True):
        model = xvlm_retrieval.build(WIDE, SMALL / "state_dict.safetensors").train()  # with dropout
        if checkpointed:
            checkpoint_blocks(model.blocks())
        torch.manual_seed(3)
        model(batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_the_task_is_found_by_its_name():
    assert "xvlm" in models.of_task("retrieval") and models.of_task("nonsense") == ()
    assert models.find_task("xvlm", "retrieval") is xvlm_retrieval
    with pytest.raises(ValueError, match="no nonsense with the model 'xvlm'"):
        models.find_task("xvlm", "nonsense")
    with pytest.raises(ValueError, match="did you mean 'xvlm'"):
        models.check_task("xvml", "retrieval")


# Two processes


def next_pair(rows, _, ids, pool, **options):
    """In place of a draw: the pair that follows, wherever it is, so that any number of processes has the same."""
    following = (torch.stack([(pool == i).nonzero()[0, 0] for i in ids]) + 1) % len(pool)
    return following, following


def uneven(batch):
    """Four pairs, of which the last two have shorter texts."""
    atts = torch.ones_like(batch["text_atts"])
    atts[2:, 4:] = 0
    return {"image": batch["image"], "text_ids": batch["text_ids"], "text_atts": atts, "sample_ids": torch.arange(4)}


def one_rank(rank, address, results, batch):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    own = {name: tensor.chunk(2)[rank] for name, tensor in uneven(batch).items()}
    own |= {name: own[name][:, : int(own["text_atts"].sum(1).max())] for name in ("text_ids", "text_atts")}
    xvlm_retrieval.draw_negatives = next_pair
    model = xvlm_retrieval.build(WIDE, SMALL / "state_dict.safetensors").eval()
    replica = DistributedDataParallel(model)  # it must outlive the backward pass
    losses = replica(own)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients}, f"{results}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_are_one_with_all_pairs(tmp_path, batch, monkeypatch):
    multiprocessing.spawn(one_rank, (f"file://{tmp_path}/store", str(tmp_path), batch), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    monkeypatch.setattr(xvlm_retrieval, "draw_negatives", next_pair)
    model = xvlm_retrieval.build(WIDE, SMALL / "state_dict.safetensors").eval()
    losses = model(uneven(batch))
    losses["loss"].backward()
    for name, value in losses.items():
        torch.testing.assert_close(sum(found["losses"][name] for found in ranks) / 2, value.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ranks[0]["gradients"][name], p.grad, rtol=1e-3, atol=1e-5)
