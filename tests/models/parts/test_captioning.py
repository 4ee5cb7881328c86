"""The captioning models: known answers, cached generation against plain loops, the pretrained checkpoints' names."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import models
from engine.training.finetuning import checkpoint_blocks, read_masks
from models.blip import captioning as blip_captioning
from models.blip import model as blip
from models.parts.captioning import check_captioning_weights
from models.xvlm import captioning as xvlm_captioning
from models.xvlm import captioning_pretrain as xvlm_captioning_pretrain
from models.xvlm import model as xvlm
from sparsity.masks import Masks
from tests.conftest import BLIP_CONFIG, CONFIG, SMALL, SMALL_BLIP

pytestmark = pytest.mark.script

TASKS = {"xvlm": xvlm_captioning, "blip": blip_captioning}
TRUNKS = {"xvlm": xvlm, "blip": blip}
CHECKPOINTS = {"xvlm": SMALL / "state_dict.safetensors", "blip": SMALL_BLIP / "state_dict.safetensors"}
SIZES = {"xvlm": CONFIG, "blip": BLIP_CONFIG}
KNOWN = Path("tests/data/tasks_small")
KEYS = Path("tests/data/checkpoints")
PROMPT, END = (3, 8, 9, 10), 4  # [CLS] a picture of, [SEP]
DEC = 210


def wide(config, side=64):
    """The same model for larger images; it was pretrained on 48 x 48."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=side))


def build(name, weights=None, side=64, **options):
    return TASKS[name].build(wide(SIZES[name], side), weights, **{"prompt": PROMPT, "end": END} | options)


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    """Return the model of the known answers: the pretrained one as captioning takes it, pruned at 75 %."""
    model = build(name, CHECKPOINTS[name]).eval()
    view = TASKS[name].prunable_view(model)
    masks = read_masks(KNOWN / f"{name}_captioning/masks.safetensors", view, TASKS[name].task_names)
    assert masks.report(view).overall.sparsity > 0.74
    masks.apply(view)
    return model


@pytest.fixture
def batch(name):
    inputs = load_file(KNOWN / f"{name}_captioning/inputs.safetensors")
    ids = inputs["input_ids" if name == "xvlm" else "input_ids_before_bos"]
    return {"image": inputs["image"], "text_ids": ids, "text_atts": inputs["attention_mask"]}


def test_it_is_taught_in_the_pass_of_its_loss(name, model, batch):
    view = TASKS[name].prunable_view(model)
    losses, own = model.taught(batch, 0.0, view.outputs)
    assert losses["loss"].item() == pytest.approx(model(batch)["loss"].item(), rel=1e-5)
    assert own["words"].real.sum() == batch["text_atts"].sum() - len(PROMPT) * len(batch["image"])
    torch.testing.assert_close(own["words"].tensor, view.outputs(batch)["words"].tensor)


# Known answers


def test_the_loss(name, model, batch):
    expected = load_file(KNOWN / f"{name}_captioning/outputs.safetensors")["loss"].item()
    assert model(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("found", "options"),
    [("beam3", {}), ("hf_greedy", {"num_beams": 1}), ("beam3_rep", {"repetition_penalty": 1.3})],
)
def test_generated_tokens(name, model, batch, found, options, use_cache):
    expected = load_file(KNOWN / f"{name}_captioning/outputs.safetensors")
    if f"tokens_{found}" not in expected:
        pytest.skip("only known of XVLM")
    tokens = model.generate(batch["image"], use_cache=use_cache, **options)
    assert torch.equal(tokens, expected[f"tokens_{found}"])


# The loss


def naive_loss(name, model, batch):
    """Token by token from the logits of the whole texts."""
    ids, total, count = model.started(batch["text_ids"]), 0.0, 0
    logits = model.text_decoder.cls(
        model.text_decoder.bert(ids, batch["text_atts"], model.encode_image(batch["image"]))
    )
    for row, length in enumerate(batch["text_atts"].sum(1)):
        for place in range(len(PROMPT), length):
            log = logits[row, place - 1].log_softmax(-1)
            target = torch.full_like(log, 0.1 / len(log))
            target[ids[row, place]] = 0.9 if name == "xvlm" else 0.9 + 0.1 / len(log)
            total, count = total - (target * log).sum(), count + 1
    return total / count


def test_the_loss_counts_each_token_after_the_prompt(name, model, batch):
    torch.testing.assert_close(model(batch)["loss"], naive_loss(name, model, batch), rtol=1e-5, atol=0)


def test_padding_changes_nothing(model, batch):
    longer = {key: F.pad(batch[key], (0, 5)) for key in ("text_ids", "text_atts")}
    torch.testing.assert_close(model(batch | longer)["loss"], model(batch)["loss"], rtol=1e-5, atol=0)


def test_the_decoder_sees_no_later_token(model, batch):
    image = model.encode_image(batch["image"])
    states = model.text_decoder.bert(batch["text_ids"], torch.ones_like(batch["text_ids"]), image)
    changed = batch["text_ids"].clone()
    changed[:, 6] = 77
    others = model.text_decoder.bert(changed, torch.ones_like(changed), image)
    torch.testing.assert_close(states[:, :6], others[:, :6], rtol=0, atol=0)
    assert (states[:, 6:] != others[:, 6:]).any(-1).all()


def test_all_parameters_learn(model, batch):
    model.train()(batch)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_first_token_is_the_models_own(name, model, batch):
    first = model.started(batch["text_ids"])[:, 0]
    assert (first == (DEC if name == "blip" else PROMPT[0])).all()
    assert (model.generate(batch["image"])[:, 0] == first).all()


def test_checkpointed_blocks_give_the_same_gradients(name, batch):
    gradients = []
    for checkpointed in (False, True):
        model = build(name, CHECKPOINTS[name]).train()  # with dropout
        if checkpointed:
            checkpoint_blocks(model.blocks())
        torch.manual_seed(3)
        model(batch)["loss"].backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        if checkpointed:
            assert model.generate(batch["image"]).shape == (4, 20)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


# Generation


@torch.no_grad()
def greedy(model, image, max_length=20, min_length=5):
    """The whole text through the whole decoder for each token."""
    ids = model.started(torch.tensor([PROMPT] * len(image)))
    tokens, done = model.encode_image(image), torch.zeros(len(image), dtype=torch.bool)
    while ids.shape[1] < max_length and not done.all():
        scores = model.text_decoder.cls(model.text_decoder.bert(ids, torch.ones_like(ids), tokens)[:, -1])
        if ids.shape[1] < min_length:
            scores[:, END] = -torch.inf
        new = scores.argmax(-1).masked_fill(done, 0)
        ids, done = torch.cat([ids, new[:, None]], 1), done | (new == END)
    return ids


def bent(model, towards=0.0):
    """The model with a random head, so that texts differ and end at different lengths; `towards` the end sooner."""
    generator = torch.Generator().manual_seed(5)
    head = model.text_decoder.cls.predictions
    with torch.no_grad():
        head.transform.LayerNorm.weight.mul_(8)
        head.decoder.bias.copy_(torch.randn(head.decoder.bias.shape, generator=generator))
        head.decoder.bias[END] += towards
    return model


@pytest.mark.parametrize("towards", [0.0, 2.0, 3.0, 99.0])
def test_greedy_search_equals_the_loop_without_a_cache(model, batch, towards):
    bent(model, towards)
    tokens = model.generate(batch["image"], num_beams=1)
    assert torch.equal(tokens, greedy(model, batch["image"]))
    if towards == 99.0:  # the shortest texts: [CLS] a picture of x [SEP]
        assert tokens.shape == (4, 6) and (tokens[:, -1] == END).all()


@torch.no_grad()
def search(model, image, beams, max_length, min_length=5):
    """Beam search over one image, a beam at a time: log-probability per generated token of finished texts."""
    tokens, finished = model.encode_image(image[None]), []
    running = [(0.0, model.started(torch.tensor([PROMPT]))[0].tolist())]
    for length in range(len(PROMPT), max_length):
        found = []
        for score, ids in running:
            given = torch.tensor([ids])
            states = model.text_decoder.bert(given, torch.ones_like(given), tokens)[:, -1]
            log = model.text_decoder.cls(states)[0].log_softmax(-1)
            if length < min_length:
                log[END] = -torch.inf
            found += [(score + value.item(), [*ids, i]) for i, value in enumerate(log)]
        best = sorted(found, key=lambda item: -item[0])[: 2 * beams]
        ended = [(score / (length + 1 - len(PROMPT)), ids) for score, ids in best[:beams] if ids[-1] == END]
        finished = sorted(finished + ended, key=lambda item: -item[0])[:beams]
        running = [item for item in best if item[1][-1] != END][:beams]
        bound = running[0][0] / (length + 1 - len(PROMPT))  # as the heuristic of transformers has it
        if len(finished) == beams and finished[-1][0] >= bound:
            break
    else:
        finished += [(score / (max_length - len(PROMPT)), ids) for score, ids in running]
    return max(finished, key=lambda item: item[0])[1]


@pytest.mark.parametrize("towards", [1.0, 3.0])
def test_beam_search_equals_the_loop_over_beams(model, batch, towards):
    bent(model, towards)
    tokens = model.generate(batch["image"], num_beams=3, max_length=12)
    for row, image in zip(tokens, batch["image"], strict=True):
        expected = search(model, image, 3, 12)
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}, {"num_beams": 5, "max_length": 9, "min_length": 8}])
def test_the_cache_changes_nothing(model, batch, options):
    bent(model, 1.0)
    cached, plain = (model.generate(batch["image"], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] <= options.get("max_length", 20)


@pytest.mark.parametrize("beams", [1, 3])
def test_each_step_computes_one_token(model, batch, monkeypatch, beams):
    """With the cache: a library that hands it over under another name would make every step compute all of the text."""
    lengths = []
    embed = model.text_decoder.bert.embeddings
    embed.register_forward_pre_hook(
        lambda module, inputs, named: lengths.append(_ids(inputs, named).shape[1]), with_kwargs=True
    )
    model.generate(batch["image"], num_beams=beams, min_length=9, max_length=10)
    assert lengths[0] == len(PROMPT) and len(lengths) > 3 and set(lengths[1:]) == {1}


def _ids(inputs, named):
    return inputs[0] if inputs else next(iter(named.values()))


def test_the_image_is_encoded_once_and_its_keys_are_computed_once(model, batch, monkeypatch):
    calls = {"image": 0, "keys": 0}
    layer = model.text_decoder.bert.encoder.layer[-1].crossattention.self

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(model, "encode_image", counted("image", model.encode_image))
    monkeypatch.setattr(layer, "keys_values", counted("keys", layer.keys_values))
    model.generate(batch["image"])
    assert calls == {"image": 1, "keys": 1}


def test_a_caption_does_not_depend_on_its_neighbours(model, batch):
    bent(model, 1.0)
    together = model.generate(batch["image"])
    for row, image in zip(together, batch["image"], strict=True):
        (alone,) = model.generate(image[None])
        assert torch.equal(alone, row[: len(alone)]) and not row[len(alone) :].any()


def test_generation_leaves_the_model_as_it_was(name, batch):
    model = build(name, CHECKPOINTS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode).generate(batch["image"])
        assert all(module.training is mode for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# Checkpoints


@pytest.mark.parametrize(
    ("keys", "make"),
    [
        ("XVLMCaptioning", lambda: xvlm_captioning.XVLMCaptioning(wide(xvlm.Config(), 384), prompt=PROMPT, end=END)),
        ("XVLMCaptioningPretrain", lambda: xvlm_captioning.XVLMCaptioning(xvlm.Config(), prompt=PROMPT, end=END)),
        ("BLIPCaptioning", lambda: blip_captioning.BLIPCaptioning(wide(blip.Config(), 384), prompt=PROMPT, end=END)),
    ],
)
def test_keys_and_shapes_are_the_published_ones(keys, make):
    with torch.device("meta"):
        full = make()
    expected = json.loads((KEYS / f"{keys}.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in full.state_dict().items()} == expected


def test_the_pretrained_weights_are_where_they_belong(name):
    trunk = TRUNKS[name].build(SIZES[name], CHECKPOINTS[name]).state_dict()
    own = build(name, CHECKPOINTS[name], side=48).state_dict()
    for key, tensor in own.items():
        source = key.replace("text_decoder.", "text_encoder.", 1) if name == "xvlm" else key
        assert torch.equal(tensor, trunk[source])


@pytest.mark.parametrize("left_out", ["text_decoder.", "text_encoder."])
def test_what_encoder_and_decoder_of_blip_share_may_have_either_name(tmp_path, left_out):
    state = load_file(CHECKPOINTS["blip"])
    kept = {
        key: t for key, t in state.items() if not key.startswith(left_out) or ".attention." in key or ".cls." in key
    }
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "w.safetensors")
    expected = build("blip", CHECKPOINTS["blip"], side=48).state_dict()
    torch.testing.assert_close(
        build("blip", tmp_path / "w.safetensors", side=48).state_dict(), expected, rtol=0, atol=0
    )


def test_the_decoders_own_weights_go_before_the_encoders(tmp_path):
    """In a checkpoint of a task in which they are no longer the same."""
    state = load_file(CHECKPOINTS["blip"])
    encoder = {key: t + 1 for key, t in state.items() if key.startswith("text_encoder.") and t.is_floating_point()}
    save_file(state | encoder, tmp_path / "w.safetensors")
    expected = build("blip", CHECKPOINTS["blip"], side=48).state_dict()
    torch.testing.assert_close(
        build("blip", tmp_path / "w.safetensors", side=48).state_dict(), expected, rtol=0, atol=0
    )


def test_random_weights_are_those_of_the_pretrained_model(name):
    states = []
    for make in (lambda: build(name, side=48), lambda: TRUNKS[name].build(SIZES[name])):
        torch.manual_seed(1)
        states.append(make().state_dict())
    trunk = {key: tensor for old, tensor in states[1].items() for key in TASKS[name].task_names(old)}
    assert states[0].keys() <= trunk.keys()
    spread = {key: states[0][key].float().std() for key in states[0] if key.endswith("query.weight")}
    assert all(trunk[key].std() == pytest.approx(value.item(), rel=0.2) for key, value in spread.items())


def test_a_checkpoint_of_the_task_loads_as_well(name, model, tmp_path):
    save_file({key: t.clone().contiguous() for key, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    again = build(name, tmp_path / "w.safetensors")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_first_stage_feeds_the_second(tmp_path, batch):
    """As captioning_pretrain.py writes it, among other things and on smaller images."""
    first = xvlm_captioning_pretrain.build(CONFIG, CHECKPOINTS["xvlm"], prompt=PROMPT[:1], end=END)
    torch.save({"step": 3, "model": first.state_dict(), "optimizer": {"state": {}}}, tmp_path / "last.pt")
    check_captioning_weights(tmp_path / "last.pt")
    second = build("xvlm", tmp_path / "last.pt")
    assert torch.equal(
        second.text_decoder.bert.encoder.layer[0].output.dense.weight,
        first.state_dict()["text_decoder.bert.encoder.layer.0.output.dense.weight"],
    )
    assert second.vision_encoder.pos_embed.weight.shape[0] == 17
    with pytest.raises(ValueError, match="no text decoder in this file"):
        check_captioning_weights(CHECKPOINTS["xvlm"])


def test_the_first_stage_learns_all_but_the_first_token():
    inputs = load_file(KNOWN / "xvlm_captioning/inputs.safetensors")
    batch = {"image": inputs["image"], "text_ids": inputs["input_ids"], "text_atts": inputs["attention_mask"]}
    model = xvlm_captioning_pretrain.build(
        wide(CONFIG), CHECKPOINTS["xvlm"], prompt=PROMPT[:1], end=END, label_smoothing=0.0
    )
    logits = model.eval().text_decoder.cls(
        model.text_decoder.bert(batch["text_ids"], batch["text_atts"], model.encode_image(batch["image"]))
    )
    labels = batch["text_ids"].masked_fill(batch["text_atts"] == 0, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(batch)["loss"], expected, rtol=1e-5, atol=0)


def test_weights_of_another_model_are_refused(name, tmp_path):
    state = load_file(CHECKPOINTS[name])
    dropped = next(key for key in state if key.endswith("layer.0.attention.self.query.weight"))
    decoder = dropped.replace("text_encoder.", "text_decoder.bert.") if name == "blip" else dropped
    save_file({key: t for key, t in state.items() if key != decoder}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: text_decoder.bert.encoder.layer.0.attention.self.query.weight"):
        build(name, tmp_path / "w.safetensors", side=48)


# Masks


def random_masks(name):
    """Return the pretrained model and masks that are applied to it, of half of each weight."""
    trunk = TRUNKS[name].build(SIZES[name], CHECKPOINTS[name])
    view, generator = TRUNKS[name].prunable_view(trunk), torch.Generator().manual_seed(0)
    masks = {key: torch.rand(w.parameter.shape, generator=generator) < 0.5 for key, w in view.weights.items()}
    aliases = {key: weight.aliases for key, weight in view.weights.items()}
    masks = Masks(masks, {"pruner": "toss"}, aliases)
    masks.apply(view)
    return trunk, masks


def public(masks):
    """As the public mask files have it: an entry for each name of a weight."""
    names = ((alias, mask) for name, mask in masks.items() for alias in masks.aliases.get(name, (name,)))
    return {alias.removesuffix(".weight") + ".weight_pruning_mask": mask.float() for alias, mask in names}


@pytest.mark.parametrize("kind", ["ours", "public"])
def test_masks_of_the_pretrained_model_prune_the_same_weights(name, tmp_path, kind):
    """A masked pretrained model has the decoder that the masked captioning model has."""
    trunk, masks = random_masks(name)
    if kind == "ours":
        masks.save(tmp_path / "m")
    else:
        torch.save(public(masks), tmp_path / "m")
    model = build(name, CHECKPOINTS[name], side=48)
    view = TASKS[name].prunable_view(model)
    held = read_masks(tmp_path / "m", view, TASKS[name].task_names)
    held.apply(view)
    state = trunk.state_dict()
    expected = {key: tensor for old, tensor in state.items() for key in TASKS[name].task_names(old)}
    torch.testing.assert_close(
        {key: t for key, t in model.state_dict().items()},
        {key: expected[key] for key in model.state_dict()},
        rtol=0,
        atol=0,
    )
    held.save(tmp_path / "task.safetensors")
    again = read_masks(tmp_path / "task.safetensors", view, TASKS[name].task_names)
    assert again.digest() == held.digest() and (kind == "public" or again.provenance == {"pruner": "toss"})


def test_what_is_prunable_is_so_in_the_pretrained_model(name):
    trunk = TRUNKS[name].prunable_view(TRUNKS[name].build(SIZES[name])).weights
    own = TASKS[name].prunable_view(build(name)).weights
    renamed = {key: w.group for old, w in trunk.items() for key in TASKS[name].task_names(old)}
    assert {key: weight.group for key, weight in own.items()} == renamed
    left_out = [old for old in trunk if not TASKS[name].task_names(old)]
    assert all(old.startswith("text_encoder.") and ".attention." in old for old in left_out)
    assert len(left_out) == (0 if name == "xvlm" else 4 * BLIP_CONFIG.text.layers)


def test_a_mask_of_another_model_is_refused_with_the_first_names(name, tmp_path):
    other = next(key for key in TASKS if key != name)
    random_masks(other)[1].save(tmp_path / "m.safetensors")
    view = TASKS[name].prunable_view(build(name))
    with pytest.raises(ValueError, match=r"--mask .*m.safetensors: the masks do not fit this model: \d+ missing: vis"):
        read_masks(tmp_path / "m.safetensors", view, TASKS[name].task_names)


def test_the_tasks_are_found_by_their_names():
    assert models.find_task("blip", "captioning") is blip_captioning
    assert models.of_task("captioning_pretrain") == ("xvlm",)
    with pytest.raises(ValueError, match="no captioning_pretrain with the model 'blip'; there is with: xvlm"):
        models.find_task("blip", "captioning_pretrain")


def test_without_label_smoothing_the_loss_is_the_plain_cross_entropy():
    model = xvlm_captioning_pretrain.build(CONFIG, prompt=(3,), end=4, label_smoothing=0.0)
    logits, targets = torch.randn(5, 210), torch.randint(210, (5,))
    torch.testing.assert_close(model.language_loss(logits, targets), F.cross_entropy(logits, targets))
