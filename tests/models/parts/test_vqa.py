"""Models that answer questions: published names, what they begin as, masks; loss and ranking against plain loops."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from engine.export import save_weights
from engine.training.finetuning import checkpoint_blocks, read_masks
from models.blip import model as blip
from models.blip import vqa as blip_vqa
from models.parts import vqa as answering
from models.parts.bert import TextConfig
from models.parts.clip_vision import VisionConfig
from models.xvlm import model as xvlm
from models.xvlm import vqa as xvlm_vqa
from sparsity.masks import Masks

pytestmark = pytest.mark.script

TEXT = TextConfig(vocab_size=60, width=32, layers=5, fusion_layer=3, heads=2, mlp_width=48, max_positions=16)
PLAIN = dataclasses.replace(TEXT, fusion_layer=0, token_types=False, layers=2)
SIZES = {
    "xvlm": xvlm.Config(
        vision=VisionConfig(
            image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_width=64, local_attn_depth=1
        ),
        text=TEXT,
        embed_dim=8,
        max_tokens=12,
    ),
    "blip": blip.Config(
        vision=blip.VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2),
        text=PLAIN,
        embed_dim=8,
        queue_size=8,
        max_tokens=12,
    ),
}
FULL = {"xvlm": ("XVLMVQA", xvlm_vqa.XVLMVQA, 384), "blip": ("BLIPVQA", blip_vqa.BLIPVQA, 480)}
TASKS = {"xvlm": xvlm_vqa, "blip": blip_vqa}


@pytest.fixture(params=["xvlm", "blip"])
def name(request):
    return request.param


@pytest.fixture
def trunk(name):
    """The pretrained model, moved away from where it is initialised: norms and biases are not all alike."""
    torch.manual_seed(0)
    model = models.find(name).build(SIZES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def weights(trunk, tmp_path):
    return saved(trunk, tmp_path / "trunk.safetensors")


@pytest.fixture
def model(name, weights):
    return TASKS[name].build(SIZES[name], weights).eval()


def saved(model, path):
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, path)
    return path


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = 2
    atts = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * atts, atts


@pytest.fixture
def batch():
    """Three questions with 2, 1 and 3 answers."""
    question, answer = texts([5, 3, 4]), texts([3, 2, 5, 3, 4, 2], seed=1)
    return {
        "image": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)),
        "text_ids": question[0],
        "text_atts": question[1],
        "answer_ids": answer[0],
        "answer_atts": answer[1],
        "answer_weights": torch.tensor([0.7, 0.3, 0.5, 0.4, 0.4, 0.2]),
        "answer_owner": torch.tensor([0, 0, 1, 2, 2, 2]),
    }


def test_it_is_taught_in_the_pass_of_its_loss(name, model, batch):
    view = TASKS[name].prunable_view(model)
    losses, own = model.taught(batch, 0.0, view.outputs)
    assert losses["loss"].item() == pytest.approx(model(batch)["loss"].item(), rel=1e-6)
    found, expected = own["answers"], view.outputs(batch)["answers"]
    torch.testing.assert_close(found.tensor, expected.tensor)
    assert found.real.sum(1).tolist() == [1 + 2, 4, 2 + 3 + 1], "the tokens of each question's answers after the first"


def test_keys_and_shapes_are_the_published_ones(name):
    file, kind, side = FULL[name]
    config = models.find(name).Config()
    sizes = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=side))
    with torch.device("meta"):
        full = kind(sizes)
    keys = json.loads(Path(f"tests/data/checkpoints/{file}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in full.state_dict().items()} == keys


def test_the_task_is_found_by_its_name(name):
    assert models.find_task(name, "vqa") is TASKS[name]
    assert set(models.of_task("vqa")) >= {"xvlm", "blip"}


# What the models begin as


def source(name, key):
    """Return what a tensor of the task model is called in the pretrained one."""
    if name == "blip":
        return key
    key = key.replace("text_decoder.cls.", "text_encoder.cls.")
    if key.startswith("text_decoder.bert.encoder.layer."):
        number = int(key.split(".")[4])
        key = key.replace(f"text_decoder.bert.encoder.layer.{number}.", f"text_encoder.encoder.layer.{3 + number}.")
    key = key.replace("text_decoder.bert.", "text_encoder.")
    return key if ".cls." in key else key.replace("text_encoder.", "text_encoder.bert.", 1)


def test_every_weight_is_one_of_the_pretrained_model(name, trunk, model):
    expected = trunk.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[source(name, key)]), key


def test_a_file_that_has_tied_weights_once(name, trunk, model, tmp_path):
    path = save_weights(trunk, tmp_path / "once.safetensors", tied_once=True)
    again = TASKS[name].build(SIZES[name], path)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_decoder_and_encoder_learn_apart(name, model, batch):
    model(batch)["loss"].backward()
    parameters = dict(model.named_parameters())
    assert all(parameter.grad is not None for parameter in parameters.values())
    embeddings = "embeddings.word_embeddings.weight"
    encoder, decoder = parameters[f"text_encoder.{embeddings}"], parameters[f"text_decoder.bert.{embeddings}"]
    assert encoder is not decoder and not torch.equal(encoder.grad, decoder.grad)
    assert model.text_decoder.cls.predictions.decoder.weight is decoder


def test_random_weights_begin_the_same_way():
    torch.manual_seed(0)
    model = xvlm_vqa.build(SIZES["xvlm"])
    state = model.state_dict()
    for key, origin in model.copies().items():
        assert torch.equal(state[key], state[origin])
    assert len(model.copies()) == len(list(model.text_decoder.bert.parameters()))
    assert blip_vqa.build(SIZES["blip"]).text_encoder.embeddings.word_embeddings.weight.std() < 0.03


def test_a_checkpoint_of_the_task_loads_as_well(name, model, tmp_path):
    with torch.no_grad():  # no longer a copy
        for parameter in model.text_decoder.parameters():
            parameter.add_(1.0)
    again = TASKS[name].build(SIZES[name], saved(model, tmp_path / "w.safetensors"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("missing", ["text_decoder.bert.encoder.layer.1.output.dense.weight", "text_encoder.encoder"])
def test_weights_of_another_model_are_refused(name, model, tmp_path, missing):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.startswith(missing)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"weights of another model: \d+ missing: {missing}"):
        TASKS[name].build(SIZES[name], tmp_path / "w.safetensors")


def test_widths_that_differ_are_refused():
    sizes = dataclasses.replace(SIZES["xvlm"], vision=dataclasses.replace(SIZES["xvlm"].vision, width=64))
    with pytest.raises(ValueError, match=r"vision.width 64 and text.width 32 must be equal"):
        xvlm_vqa.build(sizes)


def test_positions_are_interpolated(name, weights):
    sizes = dataclasses.replace(SIZES[name], vision=dataclasses.replace(SIZES[name].vision, image_size=64))
    model = TASKS[name].build(sizes, weights).eval()
    assert model.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 32)


@pytest.mark.parametrize(("given", "rate"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_drop_path_of_blip(given, rate):
    sizes = dataclasses.replace(SIZES["blip"], vision=dataclasses.replace(SIZES["blip"].vision, drop_path=given))
    block = blip_vqa.build(sizes).visual_encoder.blocks[-1]
    drawn = [getattr(drop, "drop_prob", 0.0) for drop in (block.drop_path1, block.drop_path2)]
    assert drawn == pytest.approx([rate, rate])


# Masks


def public_masks(trunk, path):
    """As the published files have them: an entry for every linear layer, where the pretrained model is not tied."""
    prunable = models.find("xvlm" if isinstance(trunk, xvlm.XVLM) else "blip").prunable_view(trunk).weights
    masks = {}
    for key, module in trunk.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = f"{key}.weight"
            shared = key.startswith("text_decoder.bert.") and ".attention." not in key
            mask = torch.ones_like(module.weight, dtype=torch.bool)
            if weight in prunable:
                mask = module.weight.detach() > 0
            if not shared:
                masks[f"{key}.weight_pruning_mask"] = mask
                masks[f"{key}.bias_pruning_mask"] = torch.ones(len(mask), dtype=torch.bool)
    torch.save(masks, path)
    return path


def own_masks(trunk, path):
    view = models.find("xvlm" if isinstance(trunk, xvlm.XVLM) else "blip").prunable_view(trunk)
    masks = {key: weight.parameter.detach() > 0 for key, weight in view.weights.items()}
    Masks(masks, {"pruner": "sign"}, {key: weight.aliases for key, weight in view.weights.items()}).save(path)
    return path


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("write", [public_masks, own_masks])
def test_masks_of_the_pretrained_model(name, trunk, weights, tmp_path, inherit, write):
    task = TASKS[name]
    model = task.build(SIZES[name], weights, inherit_mask=inherit)
    view = task.prunable_view(model)
    held = read_masks(write(trunk, tmp_path / "masks"), view, task.task_names, model.heirs)
    held.apply(view)
    decoder_too = inherit or name == "blip"
    prunable = models.find(name).prunable_view(trunk)
    aliases = {alias for weight in prunable.weights.values() for alias in weight.aliases}
    state = trunk.state_dict()
    for key, tensor in model.state_dict().items():
        before = state[source(name, key)]
        pruned = source(name, key) in aliases and (decoder_too or not key.startswith("text_decoder."))
        assert torch.equal(tensor, before.clamp(min=0) if pruned else before), key
    assert any(key.startswith("text_decoder.") for key in held) == decoder_too
    assert {weight.group for weight in view.weights.values()} == {w.group for w in prunable.weights.values()}
    held.save(tmp_path / "task.safetensors")
    again = read_masks(tmp_path / "task.safetensors", view, task.task_names, model.heirs)
    assert again.digest() == held.digest()


def test_the_decoder_inherits_from_a_mask_of_the_task_as_well(tmp_path):
    """A mask that a run without --inherit_mask wrote has no decoder."""
    path = own_masks(xvlm.build(SIZES["xvlm"]), tmp_path / "m.safetensors")
    dense, sparse = (xvlm_vqa.build(SIZES["xvlm"], inherit_mask=inherit) for inherit in (False, True))
    held = read_masks(path, xvlm_vqa.prunable_view(dense), xvlm_vqa.task_names, dense.heirs)
    held.save(tmp_path / "task.safetensors")
    view = xvlm_vqa.prunable_view(sparse)
    inherited = read_masks(tmp_path / "task.safetensors", view, xvlm_vqa.task_names, sparse.heirs)
    key = "encoder.layer.1.crossattention.self.key.weight"
    assert torch.equal(inherited[f"text_decoder.bert.{key}"], held[f"text_encoder.{key.replace('1', '4', 1)}"])


def test_a_mask_of_another_model_is_refused(name, model, tmp_path):
    narrow = dataclasses.replace(SIZES[name], text=dataclasses.replace(SIZES[name].text, mlp_width=24))
    path = own_masks(models.find(name).build(narrow), tmp_path / "m.safetensors")
    told = r"--mask .*m.safetensors: the masks do not fit this model: \d+ misshapen: text_encoder.encoder.layer.0.inter"
    with pytest.raises(ValueError, match=told):
        read_masks(path, TASKS[name].prunable_view(model), TASKS[name].task_names, model.heirs)


# Loss


def naive_loss(name, model, question, answer):
    """Return the loss of one answer without padding to one question, token by token; both with their states and ids."""
    states, ids = question[None], answer[None].clone()
    if name == "blip":
        ids[:, 0] = 58  # [DEC]
    smoothing = 0.1 if name == "blip" else 0.0
    loss = 0.0
    for stop in range(1, ids.shape[1]):
        prefix = ids[:, :stop]
        hidden = model.text_decoder.bert(prefix, torch.ones_like(prefix), states)[:, -1]
        log_probs = torch.log(torch.softmax(model.text_decoder.cls(hidden), dim=-1))[0]
        loss = loss - (1 - smoothing) * log_probs[ids[0, stop]] - smoothing * log_probs.mean()
    return loss


def own_states(name, model, batch, row):
    """States of one question without padding."""
    length = int(batch["text_atts"][row].sum())
    ids = batch["text_ids"][row : row + 1, :length].clone()
    image = batch["image"][row : row + 1]
    if name == "blip":
        ids[:, 0] = 59  # [ENC]
        return model.text_encoder(ids, torch.ones_like(ids), model.visual_encoder.forward_features(image))[0]
    return model.text_encoder(ids, torch.ones_like(ids), model.vision_encoder(image))[0]


def test_the_loss_is_the_weighted_sum_over_answers(name, model, batch):
    model = model.double()
    batch["image"], batch["answer_weights"] = batch["image"].double(), batch["answer_weights"].double()
    expected = 0.0
    for ids, atts, weight, owner in zip(
        *(batch[f"answer_{field}"] for field in ("ids", "atts", "weights", "owner")), strict=True
    ):
        states = own_states(name, model, batch, int(owner))
        expected = expected + weight * naive_loss(name, model, states, ids[: int(atts.sum())]) / 3
    found = model(batch)["loss"].double()  # the logits are made float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_questions_are_read_once(model, batch):
    rows = []
    model.text_encoder.encoder.layer[-1].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model(batch)
    assert rows == [3]  # questions, not answers


def test_checkpointed_blocks_give_the_same_gradients(name, weights, batch):
    gradients = []
    for checkpointed in (False, True):
        model = TASKS[name].build(SIZES[name], weights).train()
        if checkpointed:
            checkpoint_blocks(model.blocks())
        torch.manual_seed(3)
        model(batch)["loss"].backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


# Ranking


@pytest.fixture
def answers():
    """Nine answers of different lengths, the first tokens of some alike."""
    ids, atts = texts([3, 5, 2, 4, 3, 3, 6, 2, 4], seed=4)
    ids[4:7, 1] = ids[1, 1]
    return ids, atts


@pytest.fixture
def asked(model, batch):
    with torch.no_grad():
        return model.ask(model.encode_image(batch["image"]), batch["text_ids"], batch["text_atts"]), batch["text_atts"]


@torch.no_grad()
def brute_force(name, model, batch, answers):
    """Score (Q, N) and log p of the first token (Q, N), one pair at a time."""
    scores, firsts = torch.empty(3, 9), torch.empty(3, 9)
    for row in range(3):
        states = own_states(name, model, batch, row)
        start = torch.tensor([[58 if name == "blip" else 2]])
        hidden = model.text_decoder.bert(start, torch.ones_like(start), states[None])[:, 0]
        log_probs = model.text_decoder.cls(hidden).log_softmax(-1)[0]
        for number, (ids, atts) in enumerate(zip(*answers, strict=True)):
            loss = naive_loss(name, model, states, ids[: int(atts.sum())])
            firsts[row, number] = log_probs[ids[1]]
            scores[row, number] = -loss if name == "blip" else firsts[row, number] - loss
    return scores, firsts


@pytest.mark.parametrize("rows", [1, 20, 1000])  # one question at a time, two, all
def test_ranking_all_answers_is_scoring_all_answers(name, model, batch, asked, answers, rows, monkeypatch):
    monkeypatch.setattr(answering, "ROWS", rows)
    scores, _ = brute_force(name, model, batch, answers)
    for k_test in (9, 100):
        assert model.rank(*asked, *answers, k_test).tolist() == scores.argmax(1).tolist()


def test_only_answers_with_a_probable_first_token_are_scored(name, model, batch, asked, answers):
    scores, firsts = brute_force(name, model, batch, answers)
    for k_test in range(1, 9):
        kept = [sorted(range(9), key=lambda i, row=row: (-round(float(row[i]), 5), i))[:k_test] for row in firsts]
        expected = [max(of, key=lambda i, row=row: float(row[i])) for of, row in zip(kept, scores, strict=True)]
        assert model.rank(*asked, *answers, k_test).tolist() == expected


def test_states_are_not_repeated_for_each_answer(model, asked, answers):
    rows = []
    key = model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    key.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.rank(*asked, *answers, 9)
    assert rows == [3, 3]  # for the first tokens, then for all answers
