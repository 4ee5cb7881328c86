"""XVLM against known answers of the published implementation and against transformers' CLIP and BERT."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.parts.bert import Bert, TextConfig
from models.parts.clip_vision import CLIPVisionTransformer, VisionConfig
from models.parts.losses import contrastive_loss, hard_negatives
from models.xvlm import model as xvlm
from tests.conftest import SMALL

KEYS = json.loads(Path("tests/data/checkpoints/XVLMPretrain.json").read_text())
PRUNABLE = json.loads(Path("tests/data/checkpoints/prunable_xvlm.json").read_text())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_embeddings_of_a_general_batch(small_xvlm, small_batches):
    expected = load_file(SMALL / "embeds_batch0.safetensors")
    batch = small_batches["general"][0]
    with torch.no_grad():
        image, image_feat = small_xvlm.encode_image(batch["image"])
        states, text_feat = small_xvlm.encode_text(batch["text_ids"], batch["text_atts"])
        close(image, expected["general0.vision_embeds"])
        close(image_feat, expected["general0.image_feat"])
        close(states, expected["general0.text_embeds"])
        close(text_feat, expected["general0.text_feat"])
        close(small_xvlm.fuse(states, batch["text_atts"], image), expected["general0.cross_embeds"])
        close(small_xvlm.match(states, batch["text_atts"], image), expected["general0.itm_logits_pos"])
        close(small_xvlm.predict_masked(batch, image, None), expected["general0.mlm_logits"])


def test_embeddings_of_a_region_batch(small_xvlm, small_batches):
    expected = load_file(SMALL / "embeds_batch0.safetensors")
    batch = small_batches["region"][0]
    with torch.no_grad():
        regions, atts, whole = small_xvlm.encode_batch_image(batch)
        states, _ = small_xvlm.encode_text(batch["text_ids"], batch["text_atts"])
        close(regions, expected["region0.vision_embeds"])
        close(whole, expected["region0.vision_embeds_fullatts"])
        close(small_xvlm.fuse(states, batch["text_atts"], regions, atts), expected["region0.cross_embeds"])
        close(small_xvlm.predict_box(states, batch["text_atts"], whole), expected["region0.pred_bbox"])


@pytest.mark.parametrize("kind", ["general", "region"])
@pytest.mark.parametrize("i", range(4))
def test_losses(small_xvlm, small_batches, small_losses, kind, i):
    expected = small_losses[kind][i]
    torch.manual_seed(expected["seed"])
    with torch.no_grad():
        losses = small_xvlm(small_batches[kind][i])
    assert set(losses) - {"loss"} == set(expected) & {"itc", "itm", "mlm", "bbox", "giou"}
    for name, value in losses.items():
        if name != "loss":
            assert value.item() == pytest.approx(expected[name], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "loss"))


def test_hard_negatives_are_those_of_the_published_order(small_xvlm, small_batches, small_losses):
    expected = small_losses["general"][0]
    batch = small_batches["general"][0]
    with torch.no_grad():
        _, image_feat = small_xvlm.encode_image(batch["image"])
        _, text_feat = small_xvlm.encode_text(batch["text_ids"], batch["text_atts"])
    torch.manual_seed(expected["seed"])
    images, texts = hard_negatives(image_feat, text_feat, small_xvlm.temp)
    assert images.tolist() == expected["itm_negatives_image"]
    assert texts.tolist() == expected["itm_negatives_text"]


def test_negatives_never_share_an_id_and_vanish_where_there_are_none():
    features = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = torch.tensor([0, 0, 1, 1, 2, 0])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        for drawn in hard_negatives(features, features, torch.tensor(0.07), ids, generator=generator):
            assert (ids[drawn] != ids).all()
    assert hard_negatives(features, features, torch.tensor(0.07), torch.zeros(6)) is None
    assert hard_negatives(features[:1], features[:1], torch.tensor(0.07)) is None


def test_a_single_pair_skips_matching(small_xvlm, small_batches):
    batch = {k: v[:1] for k, v in small_batches["general"][0].items()}
    with torch.no_grad():
        losses = small_xvlm(batch)
    assert "itm" not in losses and losses["loss"].isfinite()


def test_equal_ids_share_the_contrastive_target():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=1) for _ in range(2))
    logits = image @ text.t() / 0.07
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    naive = -sum((rows.log_softmax(1) * targets).sum(1).mean() for rows in (logits, logits.t())) / 2
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(0.07), torch.tensor([7, 7, 8])), naive)


def test_fewer_fused_pairs_give_the_losses_of_those_pairs(small_xvlm, small_batches):
    batch = small_batches["general"][0]
    with torch.no_grad():
        part = small_xvlm(batch, objectives=("mlm",), fused_pairs=2)["mlm"]
        alone = small_xvlm({k: v[:2] for k, v in batch.items()}, objectives=("mlm",))["mlm"]
    torch.testing.assert_close(part, alone)


def test_padding_changes_nothing(small_xvlm, small_batches):
    batch = small_batches["general"][0]
    longer = {k: torch.cat([v, v.new_zeros(len(v), 5)], 1) for k, v in batch.items() if k in ("text_ids", "text_atts")}
    with torch.no_grad():
        short, _ = small_xvlm.encode_text(batch["text_ids"], batch["text_atts"])
        long, _ = small_xvlm.encode_text(longer["text_ids"], longer["text_atts"])
    real = batch["text_atts"].bool()
    torch.testing.assert_close(long[:, : short.shape[1]][real], short[real])


def test_full_size_keys_and_shapes_are_the_public_ones():
    with torch.device("meta"):
        state = xvlm.XVLM(xvlm.Config()).state_dict()
    assert {name: list(t.shape) for name, t in state.items()} == KEYS


def test_full_size_prunable_weights_order_and_groups():
    with torch.device("meta"):
        view = xvlm.prunable_view(xvlm.XVLM(xvlm.Config()))
    expected = PRUNABLE["weights"]
    assert list(view.weights) == list(expected)
    for name, weight in view.weights.items():
        assert (weight.group, list(weight.shape)) == (expected[name]["group"], expected[name]["shape"])
    assert sum(w.numel for w in view.weights.values()) == PRUNABLE["total"]
    assert set(view.groups) == {"vision", "text", "fusion"}


def test_valid_tokens_follow_the_source_of_the_input(small_xvlm, small_batches):
    view, batch = xvlm.prunable_view(small_xvlm), small_batches["region"][0]
    seen, uses = {}, {}

    def watch(name):
        return lambda module, args: seen.update({name: args[0].shape})

    for name, weight in view.weights.items():
        for module in weight.modules:
            module.register_forward_pre_hook(watch(name))
    view.forward(batch)
    for name, shape in seen.items():
        valid = view.valid_tokens(name, batch)
        uses[name] = valid is not None
        assert valid is None or valid.shape == shape[:2]
    assert set(seen) == set(view.weights), "the calibration pass runs every prunable layer"
    layer = "text_encoder.bert.encoder.layer.6.crossattention.self"
    assert [uses[f"{layer}.{part}.weight"] for part in ("query", "key", "value")] == [True, False, False]


def test_temperature_is_clamped_in_training_only(small_xvlm, small_batches):
    small_xvlm.temp.data.fill_(2.0)
    small_xvlm(small_batches["general"][0])
    assert small_xvlm.temp.item() == 2.0
    small_xvlm.train()(small_batches["general"][0])
    assert small_xvlm.temp.item() == 0.5


def test_vision_encoder_equals_transformers_clip():
    transformers = pytest.importorskip("transformers.models.clip.modeling_clip")
    from transformers import CLIPVisionConfig

    config = VisionConfig(image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_width=48, local_attn_depth=1)
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
        )
    ).eval()
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "patch_embed.weight",
        "embeddings.position_embedding.weight": "pos_embed.weight",
    }
    state = {k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}
    ours = CLIPVisionTransformer(config).eval()
    ours.load_state_dict({names.get(k, k): v for k, v in state.items()} | {"position_ids": ours.position_ids})
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = theirs(image).last_hidden_state
        layer_norm = next(m for n, m in theirs.named_modules() if n.endswith("post_layernorm"))
        torch.testing.assert_close(ours(image), layer_norm(hidden), rtol=1e-4, atol=1e-5)


def test_text_encoder_equals_transformers_bert():
    transformers = pytest.importorskip("transformers.models.bert.modeling_bert")
    from transformers import BertConfig

    config = TextConfig(vocab_size=50, width=24, layers=3, fusion_layer=3, heads=3, mlp_width=48, max_positions=16)
    torch.manual_seed(0)
    theirs = transformers.BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=48,
            max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    ).eval()
    ours = Bert(config, vision_width=8).eval()
    ours.load_state_dict(theirs.state_dict() | {"embeddings.position_ids": ours.embeddings.position_ids})
    ids, atts = torch.randint(1, 50, (3, 9)), (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=atts).last_hidden_state[atts.bool()]
        torch.testing.assert_close(ours.encode_text(ids, atts)[atts.bool()], expected, rtol=1e-4, atol=1e-5)


def test_regions_that_cover_everything_equal_the_whole_image(small_xvlm, small_batches):
    batch = small_batches["region"][0]
    owner = batch["idx_to_group_img"]
    with torch.no_grad():
        everything = torch.ones_like(batch["image_atts"])
        regions, images = small_xvlm.vision_encoder.forward_regions(batch["image"], owner, everything)
        torch.testing.assert_close(regions, images[owner])
        torch.testing.assert_close(images, small_xvlm.vision_encoder(batch["image"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VisionConfig(width=65), "width"),
        (lambda: VisionConfig(image_size=100), "image_size"),
        (lambda: VisionConfig(local_attn_depth=13), "local_attn_depth"),
        (lambda: TextConfig(width=100), "width"),
        (lambda: TextConfig(fusion_layer=13), "fusion_layer"),
        (lambda: xvlm.Config(max_tokens=513), "max_tokens"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(make, named):
    with pytest.raises(ValueError, match=f"^{named} must"):
        make()
