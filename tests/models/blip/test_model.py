"""BLIP against known answers of the published implementation and against transformers' BERT."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pruners
from models.blip import model as blip
from sparsity.masks import Masks
from sparsity.run.engine import Measured
from sparsity.run.request import Request
from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.passes import collect
from sparsity.statistics.reading import CalibrationPass
from tests.conftest import BLIP_CONFIG, SMALL_BLIP

KEYS = json.loads(Path("tests/data/checkpoints/BLIPPretrain.json").read_text())
PRUNABLE = json.loads(Path("tests/data/checkpoints/prunable_blip.json").read_text())
MASK_KEYS = json.loads(Path("tests/data/checkpoints/mask_file_keys_blip.json").read_text())
LOSSES = json.loads((SMALL_BLIP / "losses.json").read_text())
NAMES = {"itc": "ita", "itm": "itm", "lm": "lm"}  # ours: the published name


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_embeddings(small_blip, blip_batches):
    expected = load_file(SMALL_BLIP / "embeds_batch0.safetensors")
    batch = blip_batches["general"][0]
    ids, atts = batch["text_ids"], batch["text_atts"]
    with torch.no_grad():
        image, _ = small_blip.encode_image(batch["image"])
        close(image, expected["general0.vision_embeds"])
        close(small_blip.text_encoder(ids, atts, None), expected["general0.text_embeds"])
        grounded, _ = small_blip.encode_text(ids, atts)
        assert (grounded[:, 0] == 211).all() and torch.equal(grounded[:, 1:], ids[:, 1:])
        close(small_blip.text_encoder(grounded, atts, image), expected["general0.cross_embeds"])
        logits = small_blip.decode(blip.started(ids, 210), atts, image)
        close(logits, expected["general0.decoder_logits"])


def test_losses_of_a_sequence_in_which_copies_and_queues_move(small_blip, blip_batches):
    for batch, expected in zip(blip_batches["general"], LOSSES["sequence"], strict=True):
        torch.manual_seed(expected["seed"])
        with torch.no_grad():
            losses = small_blip(batch)
        for ours, theirs in NAMES.items():
            assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-5)
    assert int(small_blip.queue_ptr) == 16


def test_soft_targets(small_blip, blip_batches):
    expected = LOSSES["fresh_model_batch0_alpha04"]
    torch.manual_seed(expected["seed"])
    with torch.no_grad():
        losses = small_blip(blip_batches["general"][0], alpha=expected["alpha"])
    for ours, theirs in NAMES.items():
        assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-5)


@pytest.mark.parametrize(("pruner", "allowed"), [("omp", 0.0), ("lamp", 0.001), ("snip", 0.001)])
def test_masks(small_blip, blip_batches, pruner, allowed):
    view = blip.prunable_view(small_blip)
    batches = [b for pair in zip(blip_batches["general"], blip_batches["region"], strict=True) for b in pair]
    before = {name: t.clone() for name, t in small_blip.state_dict().items()}
    chosen = pruners.build(pruner)
    torch.manual_seed(42)
    measured = Measured()
    if chosen.plan.statistics:  # the published code draws from the global stream
        view._loss = lambda batch, _: small_blip(batch, gather=False)["loss"]
        measured = chosen.measure(view, CalibrationPass(batches))
    ((_, masks),) = chosen.masks(view, measured, Request(["0.63"]))
    expected = load_file(SMALL_BLIP / "masks_63" / f"{pruner}.safetensors")
    assert set(masks) == set(expected)
    differing = sum(int((masks[name] != expected[name].bool()).sum()) for name in expected)
    assert differing <= allowed * masks.total
    for name, tensor in small_blip.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_loss_that_fails_leaves_the_momentum_copies_as_they_were(small_blip, blip_batches):
    before = copy.deepcopy(small_blip.state_dict())

    def batches():
        yield blip_batches["general"][0]
        raise OSError("no more")

    with pytest.raises(OSError):
        mean_gradients(blip.prunable_view(small_blip), batches())
    assert all(torch.equal(t, before[name]) for name, t in small_blip.state_dict().items())
    assert all(not p.requires_grad for p in small_blip.text_encoder_m.parameters())


def test_statistics_of_tied_weights_add_up_over_encoder_and_decoder(small_blip, blip_batches):
    view, batch = blip.prunable_view(small_blip), blip_batches["general"][0]
    norms = collect(view, "input_norms", [batch])
    seen = []
    layers = [m.encoder.layer[1].intermediate.dense for m in (small_blip.text_encoder, small_blip.text_decoder.bert)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        view.forward(batch)
    real = batch["text_atts"].bool()
    naive = sum(x[real].double().square().sum(0) for x in seen)
    assert len(seen) == 2
    torch.testing.assert_close(norms["text_encoder.encoder.layer.1.intermediate.dense.weight"], naive)


def test_the_pass_runs_every_layer_and_text_states_count_without_padding(small_blip, blip_batches):
    view, batch = blip.prunable_view(small_blip), blip_batches["general"][0]
    shapes = {}
    for weight in view.weights.values():
        for key, module in zip(weight.uses, weight.modules, strict=True):
            module.register_forward_pre_hook(lambda _, args, key=key: shapes.update({key: args[0].shape}))
    view.forward(batch)
    assert set(shapes) == {key for weight in view.weights.values() for key in weight.uses}
    for key, shape in shapes.items():
        valid = view.valid_tokens(key, batch)
        assert (valid is None) == (shape[1] == BLIP_CONFIG.vision.tokens)
        assert valid is None or valid.shape == shape[:2]


def test_the_decoder_cannot_look_ahead(small_blip, blip_batches):
    batch = blip_batches["general"][0]
    image = small_blip.encode_image(batch["image"])[0]
    ids, atts = batch["text_ids"], torch.ones_like(batch["text_atts"])
    changed = ids.clone()
    changed[:, 6:] = 7
    with torch.no_grad():
        a, b = (small_blip.decode(x, atts, image) for x in (ids, changed))
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_padding_changes_no_loss(small_blip, blip_batches):
    batch = blip_batches["general"][0]
    longer = batch | {k: torch.cat([batch[k], batch[k].new_zeros(4, 5)], 1) for k in ("text_ids", "text_atts")}
    losses = []
    for one in (batch, longer):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(small_blip(one, frozen=True))
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)


def test_queue_goes_round(small_blip):
    features = torch.nn.functional.normalize(torch.randn(20, 32), dim=1)
    small_blip.enqueue(image_queue=features, text_queue=features)
    small_blip.enqueue(image_queue=features, text_queue=features)
    assert int(small_blip.queue_ptr) == 8
    torch.testing.assert_close(small_blip.image_queue[:, 20:], features[:12].t())
    torch.testing.assert_close(small_blip.text_queue[:, :8], features[12:].t())


def test_full_size_keys_and_shapes_are_the_public_ones():
    with torch.device("meta"):
        state = blip.BLIP(blip.Config()).state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == KEYS


def test_full_size_prunable_weights_order_and_groups():
    with torch.device("meta"):
        view = blip.prunable_view(blip.BLIP(blip.Config()))
    expected = PRUNABLE["weights"]
    assert list(view.weights) == list(expected)
    for name, weight in view.weights.items():
        assert (weight.group, list(weight.shape)) == (expected[name]["group"], expected[name]["shape"])
    assert view.numel == PRUNABLE["total"]


@pytest.mark.script
def test_a_public_mask_file_stands_for_every_name_of_a_tied_weight(tmp_path):
    """With all keys of the published files: heads, momentum copies and biases are there, all ones."""
    vision = dataclasses.replace(BLIP_CONFIG.vision, layers=12, width=16, heads=2)
    text = dataclasses.replace(BLIP_CONFIG.text, layers=12, width=16, heads=2, mlp_width=16)
    model = blip.build(dataclasses.replace(BLIP_CONFIG, vision=vision, text=text))
    view, state = blip.prunable_view(model), model.state_dict()
    ((_, masks),) = pruners.build("omp").prune(view, None, ["0.5"])
    of_alias = {alias: masks[name] for name, weight in view.weights.items() for alias in weight.aliases}
    public = {}
    for key in MASK_KEYS:
        name = key.removesuffix("_pruning_mask")
        public[key] = of_alias[name].float() if name in of_alias else torch.ones(state[name].shape)
    torch.save(public, tmp_path / "public.pth")
    loaded = Masks.load(tmp_path / "public.pth")
    loaded.check(view)
    with loaded.applied(view):
        for alias, mask in of_alias.items():
            assert torch.equal(model.state_dict()[alias] != 0, mask), alias
    assert any(alias.startswith("text_decoder.bert.encoder.layer.11.crossattention") for alias in of_alias)


def test_a_file_without_momentum_copies_and_queues_gets_them(small_blip, tmp_path):
    state = small_blip.state_dict()
    kept = {n: t.clone() for n, t in state.items() if "_m." not in n and "queue" not in n}
    save_file(kept, tmp_path / "weights.safetensors")
    model = blip.build(BLIP_CONFIG, tmp_path / "weights.safetensors")
    for module, average in model.pairs_with_copies:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), average.parameters(), strict=True))
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(32))
    del kept["itm_head.weight"]
    save_file(kept, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="1 missing: itm_head.weight"):
        blip.build(BLIP_CONFIG, tmp_path / "less.safetensors")


def test_ties_survive_loading_and_training(small_blip):
    shared = small_blip.text_encoder.encoder.layer[0].crossattention.self.query.weight
    assert shared is small_blip.text_decoder.bert.encoder.layer[0].crossattention.self.query.weight
    own = small_blip.text_encoder.encoder.layer[0].attention.self.query.weight
    assert own is not small_blip.text_decoder.bert.encoder.layer[0].attention.self.query.weight
    fresh = blip.build(BLIP_CONFIG)
    words = fresh.text_encoder.embeddings.word_embeddings.weight
    assert words is fresh.text_decoder.cls.predictions.decoder.weight


def test_text_encoder_and_decoder_equal_transformers_bert(small_blip, blip_batches):
    transformers = pytest.importorskip("transformers.models.bert.modeling_bert")
    from transformers import BertConfig

    batch = blip_batches["general"][1]
    config = BertConfig(
        vocab_size=212,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        is_decoder=True,
        add_cross_attention=True,
    )
    theirs = transformers.BertLMHeadModel(config).eval()
    missing, unexpected = theirs.load_state_dict(small_blip.text_decoder.state_dict(), strict=False)
    assert {name.split(".")[-2] for name in missing} <= {"token_type_embeddings", "predictions"}
    theirs.bert.embeddings.token_type_embeddings.weight.data.zero_()
    with torch.no_grad():
        image = small_blip.encode_image(batch["image"])[0]
        expected = theirs(
            batch["text_ids"], attention_mask=batch["text_atts"], encoder_hidden_states=image, use_cache=False
        ).logits
        ours = small_blip.decode(batch["text_ids"], batch["text_atts"], image)
    real = batch["text_atts"].bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"queue_size": 0}, {"momentum": 1.5}, {"max_tokens": 65}])
def test_bad_sizes_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        blip.Config(**{"text": BLIP_CONFIG.text} | wrong)
